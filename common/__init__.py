"""What the method scripts share: data, normalisation, augmentations, the pore model, metrics, the run folder."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, in which file or argument, what to do."""
