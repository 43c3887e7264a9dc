"""ringserve: exact long-context inference over a ring of devices."""

from typing import TYPE_CHECKING, Any

from ringserve.sampling_params import SamplingParams

if TYPE_CHECKING:
    from ringserve.llm import LLM

__all__ = ["LLM", "SamplingParams"]


def __getattr__(name: str) -> Any:
    # Late, so that importing the package costs no transformers.
    if name == "LLM":
        from ringserve.llm import LLM

        return LLM
    raise AttributeError(f"module 'ringserve' has no attribute {name!r}")
