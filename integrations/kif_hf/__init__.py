"""KIF on Hugging Face models: attach capsules to a model, choose capsule sets per input row, count what fired."""

from .attach import Attachment, attach

__all__ = ["Attachment", "attach"]
