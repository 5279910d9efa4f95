"""Run a checkout's train.py a few steps at a time, each portion when a line on stdin asks for it.

    python study/paced.py STEPS train.py --model_type para ...     # in the checkout's folder

So `study.bench train` lets two checkouts take turns, whatever their loops look like inside: all
that it relies on is that a step ends with AdamW's. After every portion one JSON line on stdout,
{"wall_s", "cpu_s"}; the training's own output goes to stderr.
"""

import json
import os
import runpy
import sys
import time

WARM_UP = 5  # steps of an optimizer before it counts: estimates beforehand take four


def pace(optimizer_class, portion, report):
    """Make every `portion` steps of an optimizer report their seconds and wait."""
    # the class itself is changed, as its instance is made inside train.py
    plain_step = optimizer_class.step
    steps_of = {}
    started = {}

    def step(self, *args, **kwargs):
        result = plain_step(self, *args, **kwargs)
        steps_of[self] = steps_of.get(self, 0) + 1
        done = steps_of[self] - WARM_UP
        if done >= 0 and done % portion == 0:
            if done:
                wall, cpu = time.perf_counter(), time.process_time()
                seconds = {"wall_s": wall - started["wall"], "cpu_s": cpu - started["cpu"]}
                report(json.dumps(seconds))
            else:
                report("ready")
            if not sys.stdin.readline():
                os._exit(0)  # the benchmark has ended
            started.update(wall=time.perf_counter(), cpu=time.process_time())
        return result

    optimizer_class.step = step


def main():
    # before torch, as train.py does
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # the checkout's modules, not those beside this file
    sys.path[0] = os.getcwd()
    import torch

    # a private copy of stdout for the reports; the training's prints go to stderr
    reports = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    pace(torch.optim.AdamW, int(sys.argv[1]), lambda line: print(line, file=reports, flush=True))
    # as if `python train.py ...` had been typed
    sys.argv = sys.argv[2:]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
