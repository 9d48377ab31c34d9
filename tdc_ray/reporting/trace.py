"""A run's timeline in Chrome's trace format, which https://ui.perfetto.dev opens."""

from typing import Any

from tdc_ray.execution.timeline import History, Span, worker_rows

WORKERS, SERVICES = 1, 2
"""Process numbers, under which Perfetto groups the rows."""


def chrome_trace(history: History) -> dict[str, Any]:
    """Return a row for every worker's stay, and one for every chain's items that services ran.

    The format is Google's "Trace Event Format": times in microseconds; complete events ("X") of
    one row may not overlap, which those of a worker, and those of a chain's services, do not.
    """
    stays, rows = worker_rows(history)
    by_service = [span for span in history.spans if not span.workers]
    chains = list(dict.fromkeys(span.chain for span in by_service))
    now = max((span.ended or span.started for span in history.spans), default=0.0)

    def complete(process: int, row: int, span: Span) -> dict[str, Any]:
        return {
            "ph": "X",
            "pid": process,
            "tid": row,
            "name": span.item,
            "cat": span.phase,
            "ts": round(1e6 * span.started),
            "dur": round(1e6 * ((span.ended or now) - span.started)),
            "args": {"chain": span.chain, "attempt": span.attempt, "outcome": span.outcome},
        }

    def name(kind: str, process: int, row: int, text: str) -> dict[str, Any]:
        return {"ph": "M", "name": kind, "pid": process, "tid": row, "args": {"name": text}}

    return {
        "traceEvents": [
            name("process_name", WORKERS, 0, "workers"),
            name("process_name", SERVICES, 0, "services"),
            *(
                name("thread_name", WORKERS, row, f"{stay.worker} on {stay.node}")
                for row, stay in enumerate(stays)
            ),
            *(name("thread_name", SERVICES, row, chain) for row, chain in enumerate(chains)),
            *(complete(WORKERS, row, span) for row, span in rows),
            *(complete(SERVICES, chains.index(span.chain), span) for span in by_service),
        ]
    }
