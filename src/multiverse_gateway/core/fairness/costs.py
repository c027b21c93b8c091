"""The cost of a request in weighted tokens: estimated when it begins, and counted when it has ended."""

BYTES_PER_TOKEN = 4
"""Bytes of a body for which one token is expected."""
MAX_PROMPT_TOKENS = 8192
"""Most prompt tokens that are expected of a body: images make a body large, not a prompt."""
MAX_OUTPUT_TOKENS = 2048
"""Most output tokens that are expected of a request, whatever its `max_tokens`."""
USUAL_OUTPUT_TOKENS = 256
"""Output tokens that are expected of a model before any of its requests has ended."""
OUTPUT_WEIGHT = 2
"""What an output token costs, in prompt tokens."""
MAX_COST = MAX_PROMPT_TOKENS + OUTPUT_WEIGHT * MAX_OUTPUT_TOKENS
"""Largest estimate of a completion."""


def estimated_cost(body_bytes: int, *, max_tokens: int | None, mean_output_tokens: float, generates: bool = True) -> float:
    """Return what a request is charged when it begins, in weighted tokens.

    `mean_output_tokens` stands in for a `max_tokens` that the request does not have. A request that generates nothing (embeddings,
    rerank) costs its prompt, however long that is.

    >>> estimated_cost(400, max_tokens=50, mean_output_tokens=256.0)
    200.0
    """
    prompt = _estimated_prompt(body_bytes, generates)
    if not generates:
        return prompt
    output = mean_output_tokens if max_tokens is None else max(0, max_tokens)
    return prompt + OUTPUT_WEIGHT * min(output, MAX_OUTPUT_TOKENS)


def _estimated_prompt(body_bytes: int, generates: bool) -> float:
    tokens = body_bytes / BYTES_PER_TOKEN
    return min(tokens, MAX_PROMPT_TOKENS) if generates else tokens


def actual_cost(body_bytes: int, sent_bytes: int, *, usage: tuple[int, int] = (0, 0), events: int = 0, generates: bool = True) -> float:
    """Return what a request has cost, once a server has answered it: the whole prompt, and all output that was relayed.

    `usage` holds the prompt and completion tokens that the server reported, 0 where it did not; it is believed up to one token per byte,
    so that no server can bill a client for more than passed through. Without a report an event counts as a token, or 4 bytes do.

    >>> actual_cost(400, 900, usage=(90, 20)), actual_cost(400, 900, events=20), actual_cost(400, 900, usage=(10**9, 10**9))
    (130.0, 140.0, 2200.0)
    """
    prompt_tokens, output_tokens = usage
    prompt = min(prompt_tokens, body_bytes) if prompt_tokens > 0 else _estimated_prompt(body_bytes, generates)
    if not generates:
        return float(prompt)
    output = output_tokens if output_tokens > 0 else events or sent_bytes / BYTES_PER_TOKEN
    return float(prompt + OUTPUT_WEIGHT * min(output, sent_bytes))
