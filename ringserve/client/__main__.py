"""`python -m ringserve.client TARGET --file F`: the answer on stdout, how it goes on stderr."""

import argparse
import os
import sys
from pathlib import Path

from ringserve.client import Client, ClientError, Delta, Estimated, Finished, Progress, Queued
from ringserve.client.events import Event


class Display:
    """Two bars, one for the upload and one for the prefill, until the first token is there."""

    def __init__(self) -> None:
        # Late: not every user of the package has a terminal to draw on.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(stderr=True)
        self._bars = Progress(TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
                              console=console, transient=True, disable=not console.is_terminal)
        self._upload = self._bars.add_task("upload", total=None, note="")
        self._prefill = self._bars.add_task("prefill", total=100.0, note="")
        self._bars.start()

    def sent(self, sent_bytes: int, total_bytes: int) -> None:
        self._bars.update(self._upload, completed=sent_bytes, total=total_bytes,
                          note=f"{sent_bytes / 1e6:.1f} of {total_bytes / 1e6:.1f} MB")

    def show(self, event: Event) -> None:
        match event:
            case Estimated():
                self._bars.update(self._prefill, note=f"{event.prompt_tokens:,} tokens{_in(event.first_token_ms)}")
            case Queued():
                self._bars.update(self._prefill, note=f"{event.position} before it{_in(event.first_token_ms)}")
            case Progress():
                self._bars.update(self._prefill, completed=event.percent,
                                  note=f"{event.processed_tokens:,} of {event.total_tokens:,} tokens"
                                       f"{_in(event.eta_ms)}")
            case Delta():
                self.close()

    def close(self) -> None:
        self._bars.stop()


def main() -> int:
    arguments = _parser().parse_args()
    prompt = Path(arguments.file) if arguments.file is not None else arguments.text
    certificates = Path(arguments.certificates) if arguments.certificates is not None else None
    display = Display()
    try:
        with Client(arguments.target, api_key=os.environ.get("RINGSERVE_API_KEY"), model=arguments.model,
                    root_certificates=certificates) as client:
            for event in client.generate(prompt, on_upload=display.sent, max_tokens=arguments.max_tokens):
                display.show(event)
                if isinstance(event, Delta):
                    print(event.text, end="", flush=True)
                elif isinstance(event, Finished):
                    usage = event.usage
                    print()
                    print(f"{usage.prompt_tokens:,} tokens in ({usage.cached_tokens:,} from the cache), "
                          f"{usage.completion_tokens:,} out; ended by {event.reason}", file=sys.stderr)
    except (ClientError, OSError) as error:
        display.close()
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        display.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ringserve.client", description="Complete one prompt.",
                                     epilog="The API key, where one is needed, is taken from RINGSERVE_API_KEY.")
    parser.add_argument("target", help="host:port of a server")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--file", help="the prompt: a file of UTF-8")
    prompt.add_argument("--text", help="the prompt itself")
    parser.add_argument("--max-tokens", type=int, help="most tokens of the answer")
    parser.add_argument("--model", help="the model to ask")
    parser.add_argument("--certificates", help="a PEM file of root certificates; without it nothing is encrypted")
    return parser


def _in(milliseconds: int | None) -> str:
    return f", first token in {milliseconds / 1000:.0f} s" if milliseconds is not None else ""


if __name__ == "__main__":
    sys.exit(main())
