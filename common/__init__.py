"""What the method scripts share: pore model, augmentations, chunks, run folder, devices, metrics; and reads/."""


class InputError(Exception):
    """Something the user gave cannot be used. The message is one line: what, in which file or argument, what to do."""
