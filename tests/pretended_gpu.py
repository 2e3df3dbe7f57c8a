"""A GPU that is not there: tensors that say they are on one, with their values on the CPU.

    with PretendedGPU() as gpu:
        script.main(args)  # with pick_device() giving DEVICE: the whole script, as on a GPU

An operation on tensors of both devices is an error, as it would be. `gpu.waits` are the lines of the project at which
the host waits for the device, `gpu.copied` those at which a LayerNorm has to copy its input first, `gpu.float64` those
that make numbers which MPS has not, and `gpu.operations` all that ran there. What only CUDA's own kernels do, it cannot
show: their speed, their rounding, their limits.
"""

import contextlib
import sys
from pathlib import Path
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

ROOT = Path(__file__).parents[1]
ASKED = {"_local_scalar_dense", "nonzero", "masked_select", "_linalg_svd", "_linalg_eigh", "bincount"}  # all wait
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
MAY_MIX = INDEXING | {"_to_copy", "copy_", "_ctc_loss", "_ctc_loss_backward"}  # on a GPU, too, tensors of both


class Backend(_DummyBackendModule):
    def _is_in_bad_fork(self):
        return False

    def manual_seed_all(self, seed):
        pass

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretended", Backend())  # once a process
DEVICE = torch.device("pretended", 0)


class OnGPU(torch.Tensor):
    """Says that it is on DEVICE; `held`, on the CPU, has its values."""

    @staticmethod
    def __new__(cls, held):
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **layout)
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return PretendedGPU.active.run(operation, args, kwargs or {})

    def tolist(self):
        return self.cpu().tolist()

    def __reduce_ex__(self, protocol):  # of torch.save, which takes the bytes of each
        with _disable_current_modes():
            return self.held.detach().clone().__reduce_ex__(protocol)


class PretendedGPU(TorchDispatchMode):
    active = None

    def __init__(self):
        super().__init__()
        self.waits, self.copied, self.float64, self.operations = [], [], [], set()

    def __enter__(self):
        def pin_memory(x):
            made = x.clone()
            made.is_pinned_here = True
            return made

        load = torch.load

        def loaded(path, map_location=None, **options):
            with _disable_current_modes():
                state = load(path, **options)
            return tree_map(lambda x: x.to(map_location) if torch.is_tensor(x) else x, state)

        self.stack = contextlib.ExitStack()
        self.stack.enter_context(patch.object(torch, "load", loaded))
        self.stack.enter_context(patch.object(torch.Tensor, "pin_memory", pin_memory))
        # as on a GPU: new parameters where a module is moved, optimizers that take all parameters at once
        overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
        self.stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        types = [torch.Tensor, torch.nn.Parameter, OnGPU]
        self.stack.enter_context(patch.object(sys.modules["torch.optim.optimizer"], "_foreach_supported_types", types))
        self.stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        PretendedGPU.active = self
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.run(operation, args, kwargs or {})

    def place(self):
        """The line of the project that is running."""
        frame = sys._getframe()
        while frame:
            path = Path(frame.f_code.co_filename)
            if path.parent in (ROOT, ROOT / "common"):
                return f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back
        return "elsewhere"

    def run(self, operation, args, kwargs):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, OnGPU)]
        theirs = [x for x in tensors if not isinstance(x, OnGPU)]
        to = torch.device(kwargs["device"]).type if kwargs.get("device") else None
        if not ours and to != "pretended":
            return operation(*args, **kwargs)
        name = operation._schema.name.removeprefix("aten::")
        moved = name in ("_to_copy", "copy_")
        to_host = (moved and to == "cpu") or (name == "copy_" and not isinstance(args[0], OnGPU))
        to_gpu = moved and bool(theirs) and not to_host
        if [x for x in theirs if x.dim()] and ours and name not in MAY_MIX:
            raise AssertionError(f"{name}: tensors of the GPU and of the CPU, at {self.place()}")
        if to_gpu and (kwargs.get("non_blocking") or (name == "copy_" and args[2:3] == (True,))):
            if not hasattr(theirs[0], "is_pinned_here"):
                raise AssertionError(f"{name}: non_blocking, from memory that is not pinned, at {self.place()}")
        elif name in ASKED or to_host or to_gpu:
            self.waits.append(self.place())
        elif name == "_ctc_loss":  # it takes both lengths to the host
            self.waits += [self.place() for x in args[2:4] if isinstance(x, OnGPU)]
        elif name in INDEXING:
            indices = [x for x in args[1] if x is not None]
            self.waits += [self.place() for x in indices if x.dtype is torch.bool or not isinstance(x, OnGPU)]
        if name == "native_layer_norm" and not ours[0].is_contiguous():
            self.copied.append(self.place())
        if name.startswith("_use_"):  # cuDNN's and MIOpen's CTC, which want other targets
            return False

        def held(x):
            if isinstance(x, OnGPU):
                return x.held
            return torch.device("cpu") if isinstance(x, torch.device) else x

        out = operation(*tree_map(held, args), **tree_map(held, kwargs))
        if to_host:
            return args[0] if name == "copy_" else out.clone()
        self.operations.add(operation)
        self.float64 += [self.place() for x in tree_leaves(out) if torch.is_tensor(x) and x.dtype is torch.float64]
        given = {id(x.held): x for x in ours}  # what an operation writes to is what it gives back
        return tree_map(lambda x: given[id(x)] if id(x) in given else OnGPU(x) if torch.is_tensor(x) else x, out)
