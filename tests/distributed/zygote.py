"""A process that has imported torch once and forks groups of processes that run a function together.

Starting Python and importing torch takes seconds, a fork takes milliseconds. So every scenario can have processes of
its own: none inherits a process group, a cache or a patch from the last one, and one that kills its processes harms
no other. Requests arrive as lines of JSON on the standard input, exit codes leave on the standard output.
"""

import faulthandler
import gc
import importlib
import json
import logging
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import torch.distributed.tensor.parallel  # noqa: F401

from tests.distributed.scenarios import Case, train


def serve() -> None:
    """Answers requests until the standard input ends."""
    faulthandler.enable()  # a process that dies of its memory says where
    torch.set_num_threads(1)
    train(Case(steps=2))  # the first step imports a second's worth of modules
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    gc.freeze()  # a collection in a fork would touch, and so copy, all that was imported
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the processes print must not be taken for an answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        processes = [_fork(rank, request["size"], folder, request) for rank in range(request["size"])]
        codes = _wait_for(processes, time.monotonic() + request["limit"])
        print(json.dumps(codes), file=answers, flush=True)


def _fork(rank: int, size: int, folder: Path, request: dict) -> int:
    process = os.fork()
    if process == 0:
        code = 1
        try:
            signal.alarm(int(request["limit"]) + 5)  # should the zygote die
            os.close(0)
            code = _run(rank, size, folder, request)
        except BaseException:  # noqa: BLE001
            traceback.print_exc()  # of the leave-taking: nobody else reports it
        finally:
            os._exit(code)
    return process


def _run(rank: int, size: int, folder: Path, request: dict) -> int:
    warnings.simplefilter("error")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # advice on how to flatten meshes
    module, name, arguments = pickle.loads((folder / "job").read_bytes())
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    try:
        store = dist.FileStore(str(folder / "store"), size)
        timeout = timedelta(seconds=request["timeout"])
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
        function = getattr(importlib.import_module(module), name)
        outcome = ("result", function(*arguments))
    except BaseException as error:  # noqa: BLE001
        outcome = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
    torch.save(outcome, folder / f"{rank}.tmp")
    os.replace(folder / f"{rank}.tmp", folder / f"{rank}.outcome")
    # The store's file must outlive all, and a peer may still be in a collective: nobody leaves before the others.
    if outcome[0] == "result":
        dist.barrier()
        dist.destroy_process_group()
    return 0


def _wait_for(processes: list[int], deadline: float) -> list[int]:
    """Their exit codes, minus the signal for those that were killed; kills those that are there at the deadline."""
    codes: dict[int, int] = {}
    while len(codes) < len(processes):
        for process in processes:
            if process not in codes:
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    codes[process] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(process, signal.SIGKILL)
        time.sleep(0.005)
    return [codes[process] for process in processes]


if __name__ == "__main__":
    serve()
