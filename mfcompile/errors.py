"""Every error that mfcompile raises on purpose.

::

    MfcompileError
    ├── CaptureError            a model could not be turned into a graph
    ├── InputError(ValueError)  an argument, a file or a tensor is not usable
    ├── RegionError             a modality or a region could not be decided
    ├── CalibrationError        calibration gave no usable statistics
    ├── PassError               a pass broke its contract
    │   ├── PreconditionError
    │   └── PostconditionError
    ├── MaskError               pruned weights are not zero
    ├── ExportError             an artefact could not be written
    ├── ParityError             an artefact does not compute what the model computes
    └── RuntimeLibraryError     the sparse runtime cannot be built or loaded here

A message says what happened, where (node, parameter name, shape), why it is refused, and what to do.
"""

from __future__ import annotations


class MfcompileError(Exception):
    """Base class of every error raised on purpose."""


class CaptureError(MfcompileError):
    """A model could not be captured as a graph, or its graph does not replay what the model computes."""


class InputError(MfcompileError, ValueError):
    """An argument, a file or a tensor given by the user cannot be used."""


class RegionError(MfcompileError):
    """An input has no known modality, or a pattern about regions matches nothing."""


class CalibrationError(MfcompileError):
    """Calibration did not produce statistics that can rank weights."""


class PassError(MfcompileError):
    """A pass over the graph broke its contract."""


class PreconditionError(PassError):
    """The graph given to a transform is not one that it can rewrite."""


class PostconditionError(PassError):
    """A transform returned a graph that is not what it declared."""


class MaskError(MfcompileError):
    """Weights that a mask prunes are not zero, or something is about to make them so."""


class ExportError(MfcompileError):
    """An artefact could not be written, or the written file is not valid."""


class ParityError(MfcompileError):
    """The exported artefact and the PyTorch module disagree beyond the stated tolerance."""


class RuntimeLibraryError(MfcompileError):
    """The library of sparse kernels cannot be built or loaded on this machine; models still run as dense ones."""
