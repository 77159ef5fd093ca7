"""Converts weights and optimizer state to and from the layout of a checkpoint.

A checkpoint holds whole tensors by parameter name. One process, DDP, FSDP2 and nanoGPT's files
each have a different layout.
"""
from pathlib import Path

import torch
import torch.nn as nn

from nanotune.errors import UserError
from nanotune.formats.checkpoint import plain_key, saved_weights
from nanotune.training import optimizer as optimizers
from nanotune.training.distributed import World, broadcast, is_sharded


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns {name: tensor}, references to the model's weights; of a LoRA run only the adapters.

    If the model is sharded, all ranks must call this; rank 0 gets a full copy in CPU memory, the
    others get {}.
    """
    if not is_sharded(model):
        return saved_weights(model)
    from torch.distributed.checkpoint import state_dict as dcp
    weights = dcp.get_model_state_dict(
        model, options=dcp.StateDictOptions(full_state_dict=True, cpu_offload=True))
    if weights:  # make the two copies of a tied head one tensor again, as when unsharded
        weights |= {name: weights[other] for name, other in model.tied_names().items()}
    return weights


def are_finite(weights: dict[str, torch.Tensor]) -> bool:
    """Returns whether the L2 norm of all weights is finite. It is not if a weight is NaN, infinite
    or above 1e19; the loss would not be finite either. Makes no copy."""
    norm = torch.nn.utils.get_total_norm([w.detach() for w in weights.values()])
    return bool(norm.isfinite())


def optimizer_state(model: nn.Module,
                    optimizer: torch.optim.Optimizer) -> dict[str, dict[str, torch.Tensor]]:
    """Returns {parameter name: {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}, {} before the
    first step.

    The tensors are references. If the model is sharded, rank 0 gets full copies, as in
    whole_weights.
    """
    if not is_sharded(model):
        names = {p: name for name, p in model.named_parameters()}
        return {names[p]: optimizers.plain_state(state) for p, state in optimizer.state.items()}
    if not optimizer.state:  # get_optimizer_state_dict would take a step to create it
        return {}
    from torch.distributed.checkpoint import state_dict as dcp
    return dcp.get_optimizer_state_dict(model, optimizer, options=dcp.StateDictOptions(
        full_state_dict=True, cpu_offload=True)).get("state", {})


def checked_optimizer_state(model: nn.Module, state: dict,
                            path: str | Path) -> dict[str, dict[str, torch.Tensor]]:
    """Returns a saved optimizer state, ours or nanoGPT's, as optimizer_state does.

    The model must not be sharded; `path` is for messages. Raises UserError if the state does not
    fit the model's parameters.
    """
    if {"state", "param_groups"} <= state.keys():
        state = by_name(model, state, path)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if state and state.keys() != params.keys():
        wrong = sorted(state.keys() ^ params.keys())
        raise UserError(f"{path}: its optimizer state has other parameters ({wrong[0]}, ...)")
    for name, moments in state.items():
        p = params[name]
        shapes = [(v.shape, optimizers.moment_shape(key, p.shape)) for key, v in moments.items()
                  if v.dim() and not key.endswith(".scale")]
        if any(have[1:] != need[1:] or have[0] < need[0] for have, need in shapes):
            raise UserError(f"{path}: its optimizer state does not fit {name}, {tuple(p.shape)}")
    return state


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict,
                         path: str | Path, world: World) -> None:
    """Fills an optimizer that has not stepped with a saved state.

    On several ranks all must call this, rank 0 with the state and the others with {}; each rank
    keeps the state of its shard. `path` is for messages. Raises UserError if the state does not fit
    the model, or is another optimizer's.
    """
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if world.is_main:
        state = state if is_sharded(model) else checked_optimizer_state(model, state, path)
        state = {name: cropped(moments, params[name]) for name, moments in state.items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        return fill_optimizer(params, optimizer, state, path, world)
    names = {p: name for name, p in params.items()}
    if world.size > 1:
        from torch.distributed.checkpoint import state_dict as dcp
        groups = [group | {"params": [names[p] for p in group["params"]]}
                  for group in optimizer.param_groups]
        whole = {"state": state, "param_groups": groups} if world.is_main else {}
        dcp.set_optimizer_state_dict(model, optimizer, whole, options=dcp.StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True))
    elif state:
        order = [p for group in optimizer.param_groups for p in group["params"]]
        # load_state_dict casts the tensors and moves them to the device
        optimizer.load_state_dict({
            "state": {i: state[names[p]] for i, p in enumerate(order)},
            "param_groups": optimizer.state_dict()["param_groups"]})


def cropped(state, param):
    """One parameter's state, its moments cut to the rows of `param` (wpe may be cropped)."""
    return {key: value[:len(param)] if value.dim() and not key.endswith(".scale") else value
            for key, value in state.items()}


def fill_optimizer(params, optimizer, state, path, world):
    """load_optimizer_state for the optimizers that are not torch.optim.AdamW: one parameter at a
    time, so that no rank has two copies of the state in memory."""
    for name, param in params.items():
        moments = broadcast(world, state.get(name))
        try:
            optimizers.fill_state(optimizer, param, moments)
        except UserError as e:
            raise UserError(f"{path}: {e}") from None


def by_name(model, state, path):
    """The state of a nanoGPT file by parameter name. nanoGPT numbers the matrices first, in the
    model's order, then the vectors."""
    named = list(model.named_parameters())
    names = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    if len(state["state"]) != len(names):
        raise UserError(f"{path}: its optimizer state has {len(state['state'])} parameters, "
                        f"the model {len(names)}")
    return {plain_key(name): state["state"][i] for i, name in enumerate(names)}
