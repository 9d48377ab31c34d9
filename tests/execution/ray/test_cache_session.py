import logging
import time
from pathlib import Path

import ray

from tdc_ray.execution.cache import ResultCache
from tdc_ray.execution.ray.cache_session import STALE_AFTER_S, CacheSession, ClaimRegistry


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


def test_claims_go_on_after_the_session_that_began_them(ray_cluster, tmp_path: Path, caplog):
    def session(run: str) -> CacheSession:
        return CacheSession(ResultCache(tmp_path / "store", run))

    with session("second") as second, session("third") as third:
        ray.kill(second._registry, no_restart=True)  # as it ends with the last handle of its owner
        with caplog.at_level(logging.WARNING), second.exclusive("key"):
            assert not third._claim("key", "key")
        assert third._claim("key", "key")
    assert "not available" not in caplog.text
