"""First weights from a file: compared whole with what the networks need before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from train.errors import RunError, reason
from train.settings.sections import NETWORKS

MANY = 5  # names that a message lists, of each kind


def load_weights(path: Path, networks: Mapping[str, nn.Module], *, flag: str) -> None:
    """Loads the weights of some networks.

    :param path: a safetensors file. Tensors ``KEY.*`` are those of the network ``KEY``, as in a run's
        ``weights.safetensors``, which may hold those of further networks. A file without any such prefix holds the
        weights of the only network.
    :param networks: by the keys of their roles.
    :param flag: what gave the file, for messages.
    :raises RunError: the file cannot be read, or names are missing, unexpected or misshapen; the message lists them,
        and no network has changed.
    """
    if not networks:
        return
    found = _read(path, flag)
    shares: dict[str, dict[str, Tensor]] = {}
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": []}
    for key, network in networks.items():
        prefix = f"{key}."
        share = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if not share and len(networks) == 1 and not any(name.split(".")[0] in NETWORKS for name in found):
            prefix, share = "", found
        own = network.state_dict()
        wrong["missing"] += [prefix + name for name in own if name not in share]
        wrong["unexpected"] += [prefix + name for name in share if name not in own]
        wrong["misshapen"] += [
            f"{prefix}{name} ({list(share[name].shape)} there, {list(own[name].shape)} here)"
            for name in own
            if name in share and share[name].shape != own[name].shape
        ]
        shares[key] = share
    if told := [f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names]:
        raise RunError(f"{flag} {path} does not fit {' and '.join(f'--{key}' for key in networks)}; {'; '.join(told)}")
    for key, network in networks.items():
        network.load_state_dict(shares[key])


def _read(path: Path, flag: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(path.read_bytes())
    except OSError as error:
        raise RunError(f"{flag} {path} cannot be read: {reason(error)}") from error
    except SafetensorError as error:
        raise RunError(f"{flag} {path} is damaged, or no safetensors file: {error}") from error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - MANY} more" if len(names) > MANY else ""
    return ", ".join(names[:MANY]) + more
