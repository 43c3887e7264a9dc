"""Sampler: a pure function of (logits, the request's token ids, parameters, seed, position).

No state, so any rank can choose a request's next token. Shape suffixes: V vocabulary, N rows.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ringserve.outputs import TokenLogprob
from ringserve.plan import NewRequest, SampledTokens


@dataclass(frozen=True, slots=True)
class SampleInput:
    request: NewRequest
    token_ids: Tensor
    """int64, prompt and output so far."""

    @property
    def position(self) -> int:
        """Of the token to be chosen."""
        return len(self.token_ids)

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.request.prompt_tokens


def sample(logits_NV: Tensor, inputs: list[SampleInput]) -> list[SampledTokens]:
    """The next token of each row. A row whose logits are not numbers gives an error, never a token."""
    logits_NV = logits_NV.float()
    sound = torch.isfinite(logits_NV.amax(dim=-1)).tolist()
    best = logits_NV.argmax(dim=-1).tolist()
    results = []
    for i, (row, good) in enumerate(zip(inputs, sound)):
        if not good:
            results.append(SampledTokens(row.request.handle, [], [],
                                         error=f"the model gave logits that are not finite at token {row.position}"))
            continue
        params = row.request.params
        plain = params.greedy and _is_plain(row)
        token = best[i] if plain else choose(logits_NV[i], row)
        if token is None:
            results.append(SampledTokens(row.request.handle, [], [], error=(
                f"penalties, biases and forbidden ends leave no token to choose at token {row.position}")))
            continue
        logprobs = [] if params.logprobs is None else [_logprob(logits_NV[i], token, params.logprobs)]
        results.append(SampledTokens(row.request.handle, [token], logprobs))
    return results


def _is_plain(row: SampleInput) -> bool:
    """Whether the logits are used as the model gave them."""
    p = row.request.params
    return (not p.logit_bias and p.presence_penalty == p.frequency_penalty == 0 and p.repetition_penalty == 1
            and row.num_output >= p.min_tokens)


def choose(logits_V: Tensor, row: SampleInput) -> int | None:
    """The token of one row: penalties and biases, temperature, min-p, top-k, top-p, then seeded noise.

    None when no token is left whose logit is a finite number."""
    params = row.request.params
    logits_V = _adjusted(logits_V, row)
    best = logits_V.amax()
    if not torch.isfinite(best):
        return None
    if params.greedy:
        return int(logits_V.argmax())
    # The best is 0 and the rest lies below, in fp64: no temperature, however small, makes a NaN of them.
    logits_V = (logits_V.double() - best) / params.temperature
    if params.min_p > 0:
        logits_V = logits_V.masked_fill(logits_V < math.log(params.min_p), -torch.inf)
    if 0 < params.top_k < len(logits_V):
        threshold = logits_V.topk(params.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < threshold, -torch.inf)
    if params.top_p < 1:
        logits_V = _nucleus(logits_V, params.top_p)
    # argmax of p / E with E ~ Exp(1) is a draw from p: one noise vector, no cumulative sum.
    noise_V = torch.empty(len(logits_V), dtype=torch.float64).exponential_(generator=_generator(row))
    return int((torch.softmax(logits_V.cpu(), dim=-1) / noise_V).argmax())


def _generator(row: SampleInput) -> torch.Generator:
    """The same seed gives the same noise at the same position, wherever and beside whatever it runs."""
    return torch.Generator().manual_seed(_mix(_mix(row.request.seed) ^ row.position))


def _mix(x: int) -> int:
    """splitmix64 (Steele et al. 2014): neighbouring seeds and positions give unrelated generators."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def _adjusted(logits_V: Tensor, row: SampleInput) -> Tensor:
    """Repetition penalty over prompt and output, the others over the output only, biases, forbidden ends."""
    params = row.request.params
    logits_V = logits_V.clone()
    if params.repetition_penalty != 1:
        seen = torch.unique(row.token_ids.to(logits_V.device))
        some = logits_V[seen]
        logits_V[seen] = torch.where(some > 0, some / params.repetition_penalty, some * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = row.token_ids[row.request.prompt_tokens:].to(logits_V.device)
        counts_V = torch.bincount(output, minlength=len(logits_V))[: len(logits_V)]
        logits_V -= params.frequency_penalty * counts_V + params.presence_penalty * (counts_V > 0)
    for token, bias in params.logit_bias.items():
        logits_V[token] += bias
    if row.num_output < params.min_tokens:
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else row.request.end_token_ids)}
        logits_V[[end for end in sorted(ends) if end < len(logits_V)]] = -torch.inf
    return logits_V


def _nucleus(logits_V: Tensor, top_p: float) -> Tensor:
    """Keep the smallest set of most likely tokens whose probabilities reach top_p."""
    ordered, order = logits_V.sort(descending=True)
    probabilities = torch.softmax(ordered, dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    return logits_V.index_fill(0, order[before >= top_p], -torch.inf)


def _logprob(logits_V: Tensor, token: int, count: int) -> TokenLogprob:
    """Of the model's own distribution, before penalties and temperature."""
    logprobs_V = torch.log_softmax(logits_V, dim=-1)
    top = logprobs_V.topk(min(count, len(logits_V)))
    return TokenLogprob(token, float(logprobs_V[token]), list(zip(top.indices.tolist(), top.values.tolist())))
