"""The shape of /v1/completions."""

from ringserve.outputs import RequestOutput, TokenLogprob
from ringserve_api.engine_port import Tokenizer
from ringserve_api.prepare import Prepared
from ringserve_api.reply import Answer, Json, finite


class CompletionShape:
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, prepared: Prepared, tokenizer: Tokenizer) -> None:
        self._prepared = prepared
        self._tokenizer = tokenizer
        self._offset = len(prepared.echo or "")
        """Where the next token starts in the text: counted on over the chunks of a stream."""

    def opening(self) -> tuple[Json, Json]:
        choice = self._choice(self._prepared.echo or "", [], [], None)
        if self._prepared.return_token_ids:
            choice["prompt_token_ids"] = self._prepared.prompt_token_ids.tolist()
        return choice, {}

    def delta(self, output: RequestOutput) -> Json:
        return self._choice(output.text, output.token_ids, output.logprobs, output)

    def whole(self, answer: Answer) -> tuple[Json, Json]:
        text = (self._prepared.echo or "") + answer.text
        choice = self._choice(text, answer.token_ids, answer.logprobs, answer.last)
        if self._prepared.return_token_ids:
            choice["prompt_token_ids"] = self._prepared.prompt_token_ids.tolist()
        return choice, {}

    def _choice(self, text: str, token_ids: list[int], logprobs: list[TokenLogprob],
                end: RequestOutput | None) -> Json:
        choice: Json = {"index": 0, "text": text,
                        "logprobs": self._logprobs(logprobs) if logprobs else None,
                        "finish_reason": end.finish_reason if end is not None else None}
        if end is not None and end.finish_reason is not None:
            choice["stop_reason"] = end.stop_reason
        if self._prepared.return_token_ids:
            choice["token_ids"] = token_ids
        return choice

    def _logprobs(self, logprobs: list[TokenLogprob]) -> Json:
        tokens = [self._tokenizer.token_text(item.token_id) for item in logprobs]
        offsets = []
        for token in tokens:
            offsets.append(self._offset)
            self._offset += len(token)
        return {"tokens": tokens, "token_logprobs": [finite(item.logprob) for item in logprobs],
                "top_logprobs": [self._top(item, token) for item, token in zip(logprobs, tokens)],
                "text_offset": offsets}

    def _top(self, item: TokenLogprob, token: str) -> dict[str, float]:
        """By text, as OpenAI has it: of tokens with one text the likeliest, and always the chosen one."""
        top: dict[str, float] = {}
        for token_id, logprob in item.top:
            top.setdefault(self._tokenizer.token_text(token_id), finite(logprob))
        top.setdefault(token, finite(item.logprob))
        return top
