"""The machine of a plan: one of engine/planning/machine.py, this one, or what flags say."""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from fastkv.engine.device import resolve_device
from fastkv.engine.memory import available_bytes
from fastkv.engine.planning.ceilings import measure_ceilings
from fastkv.engine.planning.layer_time import measure_layer
from fastkv.engine.planning.machine import ASSUMED_LATENCY, MACHINES, ON_CPU, Link, Machine, Reached
from fastkv.errors import FastKVError, check_number, writable

_GIVEN = ("memory", "bandwidth", "flops", "link", "link_latency")


def device_of(args: argparse.Namespace) -> torch.device:
    """What --device names: that of a machine that need not be here, or one that must be."""
    named = MACHINES.get(args.device)
    if named is not None:
        return torch.device(named.kind)
    if args.device.partition(":")[0] not in ("cpu", "cuda"):
        known = ", ".join(MACHINES)
        raise FastKVError(
            f"must be {known}, or cpu or cuda for this machine, not {writable(args.device)}; for another GPU give "
            "--memory, --bandwidth and --flops",
            setting="device",
        )
    return resolve_device(args.device)


def machine_of(args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> Machine:
    """The machine that the flags say. --measure takes some seconds. Raises FastKVError for flags of no use."""
    for name in _GIVEN:
        if getattr(args, name) is not None:
            check_number(name, getattr(args, name), 0, 1e9, above=True)
    machine = MACHINES.get(args.device) or _this_machine(args, device)
    if args.measure:
        if args.device in MACHINES:
            raise FastKVError("--measure is for this machine: add --device cpu or --device cuda")
        found = measure_ceilings(device, dtype)
        machine = replace(machine, flops=found.flops, bandwidth=found.bandwidth, told="what was measured here just now")
        if device.type == "cpu":
            machine = replace(machine, reached=_with_layers(machine.reached, measure_layer(device, dtype)))
    return _with_given(args, machine)


def _with_layers(reached: Reached, layer_s: float) -> Reached:
    return replace(reached, layer_s=layer_s, source=f"{reached.source}; what a layer takes: here just now")


def _this_machine(args: argparse.Namespace, device: torch.device) -> Machine:
    """What is known without measuring. Several ranks on one CPU share its memory."""
    left = available_bytes(device)
    memory = None if left is None else left // (args.gpus if device.type == "cpu" else 1)
    reached = ON_CPU if device.type == "cpu" else MACHINES["h200"].reached
    return Machine(args.device, device.type, memory, None, None, reached, "nothing that was measured")


def _with_given(args: argparse.Namespace, machine: Machine) -> Machine:
    """The machine with what flags say in place of its own."""
    given = [f"--{name.replace('_', '-')}" for name in _GIVEN if getattr(args, name) is not None]
    if not given:
        return machine
    if args.memory is not None:
        machine = replace(machine, memory=int(args.memory * 2**30))
    if args.bandwidth is not None:
        machine = replace(machine, bandwidth=args.bandwidth * 1e9)
    if args.flops is not None:
        machine = replace(machine, flops=args.flops * 1e12, dtypes=())
    latency = ASSUMED_LATENCY if args.link_latency is None else args.link_latency / 1e6
    if args.link is not None:
        machine = replace(machine, link=Link(args.link * 1e9, latency))
    elif args.link_latency is not None:
        if machine.link is None:
            raise FastKVError("--link-latency goes with --link, which is not known here: give both")
        machine = replace(machine, link=replace(machine.link, latency=latency))
    return replace(machine, told=f"{machine.told}, with {', '.join(given)} as given")
