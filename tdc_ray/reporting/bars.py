"""Progress of work in a notebook or a script: bars of tqdm, as diffusers' pipelines have."""

import threading
from typing import Any

from tqdm.auto import tqdm

from tdc_ray.execution.events import Finished, Reported, Started


class Bars:
    """A sink that shows one bar for each piece of work while it runs."""

    def __init__(self) -> None:
        self._bars: dict[tuple[str, int | None], Any] = {}
        self._lock = threading.Lock()

    def __call__(self, event: object) -> None:
        """Update the bars."""
        with self._lock:
            match event:
                case Started(key, num_steps, number):
                    self._bars[key, number] = tqdm(desc=key, total=num_steps, leave=False)
                case Reported() if (bar := self._bars.get((event.key, event.number))) is not None:
                    if "loss" in event.metrics:
                        bar.set_postfix(loss=f"{event.metrics['loss']:.4f}", refresh=False)
                    bar.update(event.step - bar.n)
                case Finished(key, number) if (key, number) in self._bars:
                    self._bars.pop((key, number)).close()
