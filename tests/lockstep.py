"""Ranks in this process, one at a time, for what agrees with its peers step by step."""

import itertools
import random
import threading

import numpy
import torch


def in_lockstep(world_size, run):
    """The result of `run(rank, agree)` for each rank. One rank runs at a time, until it waits in `agree`, and each has
    its own random numbers, as in a process of its own."""
    turn, rounds, results, errors = threading.Condition(), {}, {}, []

    def agree_of(rank):
        numbering = itertools.count()

        def agree(size):
            sizes = rounds.setdefault(next(numbering), {})
            sizes[rank] = size
            torch_state, python_state, numpy_state = torch.get_rng_state(), random.getstate(), numpy.random.get_state()
            turn.notify_all()
            if not turn.wait_for(lambda: len(sizes) == world_size or errors, timeout=5) or errors:
                raise TimeoutError(f"rank {rank} waits alone")
            torch.set_rng_state(torch_state), random.setstate(python_state), numpy.random.set_state(numpy_state)
            return [sizes[r] for r in range(world_size)]

        return agree

    def run_rank(rank):
        with turn:
            try:
                results[rank] = run(rank, agree_of(rank))
            except BaseException as error:
                errors.append(error)
                turn.notify_all()

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(world_size)]
