"""First weights from a file: compared whole with what the networks need before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from models.encoder import Encoder
from train.errors import RunError, reason
from train.settings.sections import NETWORKS

MANY = 5  # names that a message lists, of each kind


def load_weights(path: Path, networks: Mapping[str, nn.Module], *, flag: str) -> list[str]:
    """Loads the weights of some networks. The last layers of an encoder (:class:`models.encoder.Encoder`) may be
    missing all together, as a pre-training leaves them out: they keep their random weights.

    :param path: a safetensors file. Tensors ``KEY.*`` are those of the network ``KEY``, as in a run's
        ``weights.safetensors``, which may hold those of further networks. A file without any such prefix holds the
        weights of the only network.
    :param networks: by the keys of their roles.
    :param flag: what gave the file, for messages.
    :returns: what was left out, a sentence each.
    :raises RunError: the file cannot be read, or names are missing, unexpected or misshapen; the message lists them,
        and no network has changed.
    """
    if not networks:
        return []
    found = _read(path, flag)
    shares: dict[str, dict[str, Tensor]] = {}
    wrong: dict[str, list[str]] = {"missing": [], "unexpected": [], "misshapen": []}
    for key, network in networks.items():
        prefix = f"{key}."
        share = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
        if not share and len(networks) == 1 and not any(name.split(".")[0] in NETWORKS for name in found):
            prefix, share = "", found
        own = network.state_dict()
        headless = _lacks_head(network, share)
        wrong["missing"] += [prefix + name for name in own if name not in share and name not in headless]
        wrong["unexpected"] += [prefix + name for name in share if name not in own]
        wrong["misshapen"] += [
            f"{prefix}{name} ({list(share[name].shape)} there, {list(own[name].shape)} here)"
            for name in own
            if name in share and share[name].shape != own[name].shape
        ]
        shares[key] = share
    if told := [f"{kind}: {_listed(names)}" for kind, names in wrong.items() if names]:
        raise RunError(f"{flag} {path} does not fit {' and '.join(f'--{key}' for key in networks)}; {'; '.join(told)}")
    return [note for key, network in networks.items() for note in load_state(network, shares[key], key=key)]


def load_state(network: nn.Module, weights: Mapping[str, Tensor], *, key: str) -> list[str]:
    """Loads weights that fit a network, but for its head, which may be missing.

    :param key: of the network's role.
    :returns: what was left out, a sentence or none.
    :raises RuntimeError: they do not fit.
    """
    own = network.state_dict()
    headless = _lacks_head(network, weights)
    network.load_state_dict({**{name: own[name] for name in headless}, **weights})
    if not headless:
        return []
    return [f"{key.upper()} begins with the weights of an encoder; its last layer ({', '.join(headless)}) is random"]


def _lacks_head(network: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """The tensors of an encoder's head, where ``weights`` hold none of them."""
    heads = tuple(f"{each}." for each in network.head) if isinstance(network, Encoder) else ()
    names = [name for name in network.state_dict() if heads and name.startswith(heads)]
    return names if not any(name in weights for name in names) else []


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
