import time

from tdc_ray.execution.events import Finished, Reported, Started
from tdc_ray.reporting.bars import Bars


def test_each_piece_of_work_has_a_bar_while_it_runs(capsys):
    bars = Bars()
    bars(Started("group-00/finetune", 4))
    bars(Started("group-00/finetune", 8, 1))  # another attempt, on a cluster
    time.sleep(0.2)  # tqdm draws no sooner
    bars(Reported("group-00/finetune", 4, {"loss": 0.25}))
    bars(Reported("group-01/finetune", 1, {}))  # of nobody
    bars(object())
    shown = capsys.readouterr().err
    assert "group-00/finetune: 100%" in shown
    assert "loss=0.2500" in shown
    assert "0/8" in shown
    for number in (None, 1, 2):
        bars(Finished("group-00/finetune", number))
    assert bars._bars == {}


def test_work_without_steps_ends_its_bar_too():
    bars = Bars()
    bars(Started("group-00/finetune", 0))
    bars(Finished("group-00/finetune"))
    assert bars._bars == {}
