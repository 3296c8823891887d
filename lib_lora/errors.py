"""Every fault a user can meet, one class each.

A message is one sentence that says what, which file, which layer, the numbers, and what to do.
"""


class PrefuseError(Exception):
    """Base of all faults that are told to the user as a sentence."""


class FileError(PrefuseError):
    """A file can not be used; its content was not interpreted."""


class IncompleteFileError(FileError):
    """The file is shorter or longer than its header says."""


class ForeignFileError(FileError):
    """The file is something else: a web page, a git-lfs pointer, an archive, a picture."""


class CorruptFileError(FileError):
    """The header lies or can not be read."""


class PickleRefusedError(FileError):
    """The file is a pickle and must be converted first, or holds more than tensors."""


class FileChangedError(FileError):
    """The file was written to while it was read."""


class OutputError(FileError):
    """The result can not be written where the user asked."""


class UnsafePathError(OutputError):
    """A name that should be a plain file name leads elsewhere."""


class NamingError(PrefuseError):
    """Keys of a file contradict each other, such as two layouts for one layer."""


class AdapterError(PrefuseError):
    """The tensors of one layer do not form an adapter."""


class NetworkError(PrefuseError):
    """A LoRA that was read well can not be applied to this model.

    Attributes:
        network: `Network.uid` of the culprit, or ``""`` where only one is in question.
    """

    def __init__(self, message: str, network: str = "") -> None:
        super().__init__(message)
        self.network = network


class NoLayersError(NetworkError):
    """Not one layer of the LoRA exists in the model."""


class BaseModelMismatchError(NetworkError):
    """The LoRA was made for another model family."""


class ShapeMismatchError(NetworkError):
    """Layers of the LoRA have other shapes than the model's."""


class NonFiniteError(NetworkError):
    """NaN or infinity, in the LoRA or in what it would make of the weights."""


class UnwritableError(NetworkError):
    """The LoRA's algorithm has to change weights that can not be rewritten."""


class UnknownLoraError(PrefuseError):
    """No LoRA of that name in the folders."""


class TagError(PrefuseError):
    """A strength or another argument of a LoRA is no usable number."""


class PresetError(PrefuseError):
    """A preset can not be saved, renamed, deleted or exported as it was asked for."""


class ApplyError(PrefuseError):
    """Writing the weights failed; the base weights are back."""


class FuseMemoryError(ApplyError):
    """Not enough memory to fuse; the base weights are back."""


class ForeignWriteError(ApplyError):
    """Something else changed weights that are fused."""


class ModelError(PrefuseError):
    """A model can not be loaded or is not one that LoRAs can be applied to."""


class RequestError(PrefuseError):
    """A picture was asked for in a way that can not be drawn, or it came out as NaN."""


class JobError(PrefuseError):
    """A job on files was asked for in a way that can not be done."""


class TrainError(PrefuseError):
    """A training can not go on or be resumed; what was saved last is kept."""


class CompileError(PrefuseError):
    """A model can not be compiled here, or would draw something else; it computes eagerly."""
