from tdc_ray.execution.timeline import History, Span, Stay
from tdc_ray.reporting.trace import chrome_trace


def span(item, workers, started, ended, outcome="done"):
    return Span("experts", "group-00", 1, item, workers, 1, started, ended, outcome)


HISTORY = History(
    (
        span("a", ("w0", "w1"), 1.0, 3.0),
        span("ask", (), 1.5, 2.5),
        span("b", ("w0",), 4.0, 5.0, "worker_lost"),
        span("c", ("w0",), 7.0, None, "running"),  # of another driver
    ),
    (
        Stay("w0", "one", 0.0, 6.0),
        Stay("w1", "two", 0.5, 6.0),
        Stay("w0", "three", 6.5, None),
    ),
    {},
)


def test_a_trace_has_a_row_per_worker_with_a_slice_per_attempt():
    events = chrome_trace(HISTORY)["traceEvents"]
    rows = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["name"] == "thread_name"
    }
    slices = [
        (rows[event["pid"], event["tid"]], event["name"], event["ts"], event["dur"])
        for event in events
        if event["ph"] == "X"
    ]
    assert slices == [
        ("w0 on one", "a", 1_000_000, 2_000_000),
        ("w1 on two", "a", 1_000_000, 2_000_000),
        ("w0 on one", "b", 4_000_000, 1_000_000),
        ("w0 on three", "c", 7_000_000, 0),
        ("group-00", "ask", 1_500_000, 1_000_000),
    ]


def test_a_slice_tells_how_the_attempt_ended():
    events = chrome_trace(HISTORY)["traceEvents"]
    (lost,) = [event for event in events if event["name"] == "b"]
    assert lost["args"] == {"chain": "group-00", "attempt": 1, "outcome": "worker_lost"}


def test_nothing_that_ran_is_an_empty_trace():
    events = chrome_trace(History((), (), {}))["traceEvents"]
    assert {event["ph"] for event in events} == {"M"}
