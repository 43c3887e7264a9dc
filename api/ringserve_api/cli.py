"""The command line: `ringserve serve | run | selftest | model build | key`. Flags come from the config dataclasses.

Exit codes: 0 done, 1 failed while running (a rank died, a self-test bound exceeded), 2 what was asked cannot work.
"""

import asyncio
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ringserve.config import CacheConfig, EngineConfig, ModelConfig, RingConfig, SchedulerConfig
from ringserve.errors import ConfigError, RequestError, RingserveError, StartupError
from ringserve.sampling_params import SamplingParams
from ringserve_api.config import ServerConfig
from ringserve_api.keys import Scope, new_key

DEFAULT_TOKENS = 256
"""Of `ringserve run`."""


@dataclass(frozen=True, kw_only=True)
class Model(ModelConfig):
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """A directory with a Hugging Face checkpoint (safetensors), or `needle` for the embedded model."""


@dataclass(frozen=True, kw_only=True)
class NeedleUnlessNamed(ModelConfig):
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[MODEL]")] = "needle"
    """A directory with a Hugging Face checkpoint (safetensors), or `needle` for the embedded model."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    prompt_file: Path | None = None
    """File with the prompt as UTF-8 text; `-` reads standard input."""

    prompt: str | None = None
    """The prompt itself, instead of a file."""

    max_tokens: int | None = None
    """Most tokens to generate. Unset: 256, or as many as the context leaves room for."""

    temperature: float = 0.0
    """0 takes the most likely token."""

    top_p: float = 1.0
    """Sample from the most likely tokens that make up this probability."""

    top_k: int = 0
    """Sample from this many most likely tokens; 0 from all."""

    seed: int | None = None
    """Makes sampling repeatable."""

    stop: tuple[str, ...] = ()
    """Strings that end the answer."""

    ignore_eos: bool = False
    """Go on after the model's end token."""

    def text(self) -> str:
        """The prompt. Raises ConfigError when there is not exactly one, it is empty, or it cannot be read."""
        if (self.prompt_file is None) == (self.prompt is None):
            raise ConfigError("give one of --prompt-file and --prompt")
        text = self.prompt if self.prompt is not None else self._read(self.prompt_file)
        if not text:
            raise ConfigError("the prompt is empty: it needs at least one token")
        return text

    def _read(self, path: Path | None) -> str:
        try:
            if str(path) != "-":
                return Path(str(path)).read_bytes().decode()
            if sys.stdin is None:
                raise OSError("standard input is closed")
            return sys.stdin.buffer.read().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"the prompt in {path} cannot be read: {error}") from error

    def params(self, room: int) -> SamplingParams:
        """`room`: tokens that the context has beyond the prompt."""
        return SamplingParams(max_tokens=self.max_tokens or max(1, min(DEFAULT_TOKENS, room)),
                              temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed,
                              stop=self.stop, ignore_eos=self.ignore_eos)


def _engine_config(model: ModelConfig, cache: CacheConfig, ring: RingConfig,
                   scheduler: SchedulerConfig) -> EngineConfig:
    return EngineConfig(model=ModelConfig(**asdict(model)), cache=cache, ring=ring, scheduler=scheduler)


def serve(model: Model, cache: CacheConfig, ring: RingConfig, scheduler: SchedulerConfig,
          server: ServerConfig) -> int:
    """Serve a model over OpenAI-compatible HTTP until Ctrl-C or SIGTERM."""
    from ringserve_api.serving import serve_model

    return asyncio.run(serve_model(_engine_config(model, cache, ring, scheduler), server))


def run(model: Model, run: RunConfig, cache: CacheConfig, ring: RingConfig, scheduler: SchedulerConfig) -> int:
    """Complete one prompt offline: progress on standard error, the answer on standard output."""
    from ringserve_api.offline import run_prompt

    run.params(1)  # a wrong value is told before a model is loaded for nothing
    return run_prompt(_engine_config(model, cache, ring, scheduler), run.text(), run.params)


def selftest(model: NeedleUnlessNamed, cache: CacheConfig, ring: RingConfig, scheduler: SchedulerConfig) -> int:
    """Prove that this ring computes what transformers computes: a table of errors against their bounds."""
    from ringserve_api.selftest_report import report_selftest

    return report_selftest(_engine_config(model, cache, ring, scheduler))


def model(action: tyro.conf.Positional[Literal["build"]], name: tyro.conf.Positional[Literal["needle"]],
          directory: tyro.conf.Positional[Path]) -> int:
    """Write an embedded model as an ordinary Hugging Face checkpoint: `ringserve model build needle DIR`.

    Args:
        action: What to do.
        name: The embedded model.
        directory: Where to write it; made when it does not exist.
    """
    from ringserve.needle import build_needle

    try:
        if directory.is_dir() and any(directory.iterdir()):
            raise ConfigError(f"{directory} is not empty: name a new directory")
        build_needle(directory)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error}") from error
    print(f"wrote {name} to {directory}")
    return 0


def key(name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="NAME")], tenant: str | None = None,
        scopes: tuple[Scope, ...] = ("inference",)) -> int:
    """Make an API key: its secret on standard error, its entry for the file of --api-keys on standard output.

    Args:
        name: Name of the key, for people.
        tenant: Whose requests they are that come with it. Unset: the name.
        scopes: What it opens: the model (inference), the control of the server (admin).
    """
    secret, entry = new_key(name, tenant, frozenset(scopes))
    print(f"The secret of the key {name!r}, which is stored nowhere and not shown again: {secret}", file=sys.stderr)
    print(entry)
    return 0


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point: runs one command and exits with its code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if (sys.argv[1:] if argv is None else list(argv)) == ["--version"]:
        print(f"ringserve {importlib.metadata.version('ringserve')}")
        sys.exit(0)
    commands: dict[str, Callable[..., Any]] = {"serve": serve, "run": run, "selftest": selftest, "model": model,
                                               "key": key}
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            commands, prog="ringserve", args=argv, config=(tyro.conf.OmitArgPrefixes,),
            description="Exact long-context inference over a ring of devices. `ringserve --version` says which.")
    except (StartupError, RequestError) as error:
        print(f"ringserve: {error.message}", file=sys.stderr)
        code = 2
    except RingserveError as error:
        print(f"ringserve: {error.message}", file=sys.stderr)
        code = 1
    except BrokenPipeError:  # whoever read the answer has seen enough
        sys.stdout = None  # nothing is left to flush
        code = 0
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
