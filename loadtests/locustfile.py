"""Load over HTTP: users who hide a code in a text and ask for it. Talks to the server only through its API.

    ringserve serve needle --ring-size 2 &
    locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 --headless -u 4 -t 30s

A request counts as good only when its stream ended with a finish reason and the answer is right. Beside the whole
request, `first token` is reported as a request of its own: time to the first text of the stream.
"""

import json
import random
import time

from locust import HttpUser, between, task

LENGTHS = (100, 1_000, 5_000)
"""Lines of filler; a line is about 16 tokens."""
WORDS = ("river", "stone", "letter", "window", "garden", "engine", "silver", "orange", "marble", "copper", "winter")


def prompt_with_code(rng: random.Random, lines: int) -> tuple[str, str]:
    """A text with a code at a random place, ending with the question; and the answer."""
    name = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=3))
    code = "".join(rng.choices("0123456789", k=8))
    text = [" ".join(rng.choices(WORDS, k=12)) + ".\n" for _ in range(lines)]
    text.insert(rng.randrange(lines), f"The secret code of {name} is {code}.\n")
    return "".join(text) + f"The secret code of {name} is", f" {code}."


class NeedleUser(HttpUser):
    wait_time = between(0.1, 1.0)

    def on_start(self) -> None:
        self.rng = random.Random(id(self))

    @task(8)
    def short(self) -> None:
        self.ask(LENGTHS[0])

    @task(3)
    def medium(self) -> None:
        self.ask(LENGTHS[1])

    @task(1)
    def long(self) -> None:
        self.ask(LENGTHS[2])

    def ask(self, lines: int) -> None:
        prompt, answer = prompt_with_code(self.rng, lines)
        body = {"model": "needle", "prompt": prompt, "max_tokens": 10, "temperature": 0, "stream": True}
        name = f"{lines} lines"
        started = time.perf_counter()
        with self.client.post("/v1/completions", json=body, stream=True, catch_response=True, name=name) as reply:
            if reply.status_code != 200:
                reply.failure(f"status {reply.status_code}: {reply.text[:200]}")
                return
            text, reason, first = "", None, None
            for line in reply.iter_lines():
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    reply.failure(f"error in the stream: {chunk['error']['code']}")
                    return
                for choice in chunk["choices"]:
                    if choice["text"] and first is None:
                        first = time.perf_counter() - started
                    text += choice["text"]
                    reason = choice["finish_reason"] or reason
            if reason is None:
                reply.failure("the stream ended without a finish reason")
            elif text != answer:
                reply.failure(f"wrong answer: {text!r} instead of {answer!r}")
            else:
                reply.success()
        if first is not None:
            self.environment.events.request.fire(request_type="TTFT", name=f"first token, {name}",
                                                 response_time=first * 1000, response_length=0, exception=None,
                                                 context={})
