import time

from tdc_ray.execution.ray.cache_session import STALE_AFTER_S, ClaimRegistry


def test_a_key_is_one_runs_until_it_lets_go():
    claims = ClaimRegistry()
    assert claims.claim("key", "one")
    assert claims.claim("key", "one")
    assert not claims.claim("key", "two")
    claims.release("key", "two")
    assert not claims.claim("key", "two")
    claims.release("key", "one")
    assert claims.claim("key", "two")


def test_a_claim_that_is_not_renewed_runs_out_and_one_that_is_does_not():
    claims, now = ClaimRegistry(), time.monotonic()
    claims.claims = dict.fromkeys(("left", "kept"), ("one", now - STALE_AFTER_S))
    claims.renew(["kept"], "one")
    assert claims.claim("left", "two")
    assert not claims.claim("kept", "two")
