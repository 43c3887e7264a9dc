"""The shape of /v1/chat/completions."""

from ringserve.outputs import RequestOutput, TokenLogprob
from ringserve_api.engine_port import Tokenizer
from ringserve_api.prepare import Prepared
from ringserve_api.reply import Answer, Json, finite


class ChatShape:
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        self._prepared = prepared
        self._tokenizer = tokenizer

    def opening(self) -> tuple[Json, Json]:
        delta = {"role": "assistant", "content": ""}
        return self._choice("delta", delta, [], [], None), self._beside()

    def delta(self, output: RequestOutput) -> Json:
        delta = {"content": output.text} if output.text else {}
        return self._choice("delta", delta, output.token_ids, output.logprobs, output)

    def whole(self, answer: Answer) -> tuple[Json, Json]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = self._choice("message", message, answer.token_ids, answer.logprobs, answer.last)
        return choice, self._beside()

    def _beside(self) -> Json:
        if not self._prepared.return_token_ids:
            return {}
        return {"prompt_token_ids": self._prepared.prompt_token_ids.tolist()}

    def _choice(self, key: str, content: Json, token_ids: list[int], logprobs: list[TokenLogprob],
                end: RequestOutput | None) -> Json:
        choice: Json = {"index": 0, key: content, "logprobs": self._logprobs(logprobs) if logprobs else None,
                        "finish_reason": end.finish_reason if end is not None else None}
        if end is not None and end.finish_reason is not None:
            choice["stop_reason"] = end.stop_reason
        if self._prepared.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        content = [
            {**self._token(item.token_id, item.logprob),
             "top_logprobs": [self._token(token_id, logprob) for token_id, logprob in item.top]}
            for item in logprobs]
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> Json:
        return {"token": self._tokenizer.token_text(token_id), "logprob": finite(logprob),
                "bytes": list(self._tokenizer.token_bytes(token_id))}
