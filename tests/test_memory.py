"""The formula of common/memory.py against what scripts take: as torch's profiler counts it, tensor by tensor."""

import gc
import importlib
from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import barlow
import common.run
from common.augment import width_kept
from common.memory import step_memory
from common.pore_model import PoreModel, frames_of
from tests.distributed_worker import SCRIPTS, arguments


class Done(Exception):
    """Ends a script's main after two steps: in the first, Adam has no moments yet."""


def two_steps(*_):
    yield from (1, 2)
    raise Done


@pytest.fixture
def predicted_and_measured(simulated, tmp_path, monkeypatch):
    """Bytes that a script takes at most in its first two steps, by the formula and by the profiler."""

    def run(name, **changes):
        script, predicted = importlib.import_module(name), {}

        def noted(*given):
            predicted[given[-1]] = step_memory(*given)
            return predicted[given[-1]]

        monkeypatch.setattr(common.run, "step_memory", noted)
        monkeypatch.setattr(common.run.Run, "steps", two_steps)
        # the last frame that may be the present: most context
        latest = lambda lengths, steps: int(frames_of(lengths.min())) - steps - 1  # noqa: E731
        monkeypatch.setattr(script, "random_present", latest, raising=False)
        changes = {"size": "small", "chunk_len": 800, "batch_size": 8} | changes
        args = arguments(name, simulated, tmp_path / name, **changes)
        gc.collect()  # what others leave behind is not to be freed meanwhile
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, pytest.raises(Done):
            script.main(args)
        events = profiled.profiler.kineto_results.events()
        measured = max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))
        return predicted[args.activation_checkpointing], measured

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_with_checkpointing_the_formula_is_within_20_percent(name, predicted_and_measured):
    predicted, measured = predicted_and_measured(name, activation_checkpointing=True)
    assert predicted == pytest.approx(measured, rel=0.2)


@pytest.mark.parametrize("name", ["barlow", "byol", "cpc", "masked"])
def test_without_it_as_well_and_it_is_much_more(name, predicted_and_measured):
    predicted, measured = predicted_and_measured(name)
    assert predicted == pytest.approx(measured, rel=0.2)


def test_in_bfloat16(predicted_and_measured):
    predicted, measured = predicted_and_measured("barlow", precision="bf16")
    assert predicted == pytest.approx(measured, rel=0.2)


def test_the_thesis_size_takes_what_a_process_of_it_took():
    """python barlow.py --lr 1e-5 --batch-size 64, on a CPU: 20.8 GB, the process whole."""
    args, pore_model = barlow.Args(), PoreModel.of_size("thesis")
    projector = barlow.Projector(pore_model.channels, args.chunk_len, args.embedding_dim)
    models = torch.nn.ModuleList([pore_model, projector])
    samples = width_kept(args.chunk_len, args.drop_chance[0])
    predicted = step_memory(pore_model, models, torch.optim.Adam(models.parameters()), 64, samples, 2, "auto", False)
    assert predicted == pytest.approx(20.8e9, rel=0.2)
