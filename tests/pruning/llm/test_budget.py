import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tdc_ray.config.proxy import ProxyConfig
from tdc_ray.errors import ProxyError
from tdc_ray.pruning.llm.answer import TokenUsage
from tdc_ray.pruning.llm.budget import Budget
from tdc_ray.pruning.llm.transcripts import (
    LLMExchange,
    append_exchange,
    transcript_path,
)

BOUND = TokenUsage(calls=1, prompt_tokens=60, completion_tokens=40)


def test_calls_under_way_together_never_pass_the_bounds():
    budget = Budget(ProxyConfig(max_concurrent=3, max_total_tokens=1050))
    lock, under_way, most = threading.Lock(), 0, 0

    def call(_: int) -> bool:
        nonlocal under_way, most
        try:
            budget.reserve(BOUND, 30)
        except ProxyError:
            return False
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.01)
        with lock:
            under_way -= 1
        budget.settle(BOUND, BOUND)
        return True

    with ThreadPoolExecutor(20) as threads:
        allowed = sum(threads.map(call, range(20)))
    assert allowed == 10
    assert most == 3
    assert budget.spent == TokenUsage(calls=10, prompt_tokens=600, completion_tokens=400)


def test_a_call_waits_for_what_others_may_leave_over():
    budget = Budget(ProxyConfig(max_total_tokens=150))
    budget.reserve(BOUND, 0)
    with pytest.raises(ProxyError, match="no call became free"):
        budget.reserve(BOUND, 0.01)
    budget.settle(BOUND, TokenUsage(calls=1, prompt_tokens=40, completion_tokens=10))
    budget.reserve(BOUND, 0)
    budget.settle(BOUND, BOUND)
    with pytest.raises(ProxyError, match=r"proxy\.max_total_tokens 150: so far 2 calls took 150"):
        budget.reserve(BOUND, 30)


def test_cost_is_bounded_by_the_prices_of_prompts_and_replies():
    config = ProxyConfig(
        max_cost=0.001,
        price_per_million_prompt_tokens=1.0,
        price_per_million_completion_tokens=10.0,
    )
    budget = Budget(config)
    assert budget.cost(BOUND) == pytest.approx(0.00046)
    for _ in range(2):
        budget.reserve(BOUND, 0)
        budget.settle(BOUND, BOUND)
    with pytest.raises(ProxyError, match=r"proxy\.max_cost 0\.001.*at a cost of 0\.00092"):
        budget.reserve(BOUND, 30)


def test_what_earlier_attempts_spent_counts_once(tmp_path):
    for round_ in (0, 1):
        path = transcript_path(tmp_path, 3, round_)
        append_exchange(path, LLMExchange({}, "hello", None, BOUND, 1.0))
    budget = Budget(ProxyConfig())
    for _ in range(3):
        budget.count_earlier(tmp_path)
    assert budget.spent == BOUND + BOUND
