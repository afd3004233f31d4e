"""What a sparse fine-tuning has changed, as an object of its own: a small file, scaled, added to others, taken back.

An adapter holds positions and learned values, and checksums of the weights that they belong to. Its files are
``sparse_adapter.safetensors`` and ``sparse_adapter.json``, sealed by a checksum over both (see
:mod:`regularized.mechanisms.sealed_files`); nothing in them is ever unpickled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regularized.fine_tuning.sara.entries import (
    SparseEntries,
    checksum,
    checksum_of_rest,
    read_entries,
    write_entries,
)
from regularized.mechanisms.sealed_files import load_sealed, save_sealed

__all__ = ["Change", "SparseAdapter", "combine_adapters"]

# Shapes: K entries of one parameter.

NAME = "sparse_adapter"
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Change:
    """The changed entries of one parameter.

    Args:
        shape: shape of the parameter.
        index: (K,) int32 or int64, positions in row-major order.
        values: (K,) what stands there after the training, in the parameter's type.
        frozen: checksum of all other entries.
        start: checksum of these entries before the training.
    """

    shape: tuple[int, ...]
    index: Tensor
    values: Tensor
    frozen: int
    start: int


class SparseAdapter:
    """Learned entries of a model's parameters.

    Args:
        changes: the change of each parameter, by its name in the model.
        threshold: below which the entries were chosen; for information.

    Raises:
        ValueError: there are no changes.

    Examples:
        >>> from regularized.fine_tuning.sara.term import SaRA
        >>> model = nn.Linear(8, 8)
        >>> sara = SaRA(model, fraction=0.2, reselect_at=0, lambda_rank=0)
        >>> optimizer = sara.bind(torch.optim.SGD(sara.parameters(), lr=0.1))
        >>> model(torch.ones(1, 8)).sum().backward()
        >>> optimizer.step()
        >>> adapter = sara.adapter()
        >>> sara.finalize()
        >>> trained = model.weight.clone()
        >>> adapter.unmerge(model)  # the pretrained model
        >>> adapter.merge(model, scale=0.5)
        >>> adapter.unmerge(model)
        >>> adapter.merge(model)
        >>> torch.equal(model.weight, trained)
        True
    """

    def __init__(self, changes: Mapping[str, Change], *, threshold: float = float("nan")) -> None:
        if not changes:
            raise ValueError("an adapter needs the changes of one parameter at least")
        self.changes: dict[str, Change] = dict(changes)
        self.threshold = threshold
        self._replaced: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, vectors: Sequence[SparseEntries], *, threshold: float) -> "SparseAdapter":
        """The adapter of a training, merged into its model as it stands.

        Examples:
            >>> layer = nn.Linear(3, 2)
            >>> entries = SparseEntries({"weight": layer.weight}, lambda p: p.abs() < 9)
            >>> len(SparseAdapter.of([entries], threshold=9.0))
            1
        """
        changes, replaced = {}, {}
        for part in vectors:
            for segment in part.segments:
                parameter = segment.parameter
                index = part.index[segment.first].clone()
                if len(index) == 0:
                    continue
                start = part.base[segment.first].to(parameter.dtype)
                replaced[segment.name] = start
                changes[segment.name] = Change(
                    tuple(parameter.shape),
                    index,
                    read_entries(parameter, index),
                    segment.frozen,
                    checksum(start, index),
                )
        adapter = cls(changes, threshold=threshold)
        adapter._replaced = replaced
        return adapter

    def __len__(self) -> int:
        """Number of parameters that are changed."""
        return len(self.changes)

    @property
    def num_entries(self) -> int:
        """Number of entries that are changed."""
        return sum(len(change.index) for change in self.changes.values())

    # -- into the model and out of it --------------------------------------------------------------

    @torch.no_grad()
    def merge(self, model: nn.Module, *, scale: float = 1.0) -> None:
        """Write the learned entries into the pretrained model, in place.

        Args:
            model: the model with its pretrained weights.
            scale: factor on the change, useful from 0 to 2; 1 (default) gives exactly the trained weights.

        Raises:
            ValueError: a parameter is missing, has another shape, or other weights than those that were fine-tuned; or
                the adapter is merged already.
        """
        if self._replaced is not None:
            raise ValueError("this adapter is merged already; unmerge(model) first")
        parameters = self._check(model)
        replaced = {}
        for name, change in self.changes.items():
            parameter = parameters[name]
            index = change.index.to(parameter.device)
            replaced[name] = read_entries(parameter, index)
            values = change.values.to(parameter.device)
            if scale != 1.0:
                start = replaced[name].to(torch.promote_types(parameter.dtype, torch.float32))
                values = torch.lerp(start, values.to(start.dtype), scale)
            write_entries(parameter, index, values)
        self._replaced = replaced

    @torch.no_grad()
    def unmerge(self, model: nn.Module) -> None:
        """Put back, bit for bit, what :meth:`merge` has replaced.

        Raises:
            ValueError: the adapter is not merged.
        """
        if self._replaced is None:
            raise ValueError("this adapter is not merged; merge(model) first")
        for name, values in self._replaced.items():
            parameter = model.get_parameter(name)
            write_entries(parameter, self.changes[name].index.to(parameter.device), values.to(parameter.device))
        self._replaced = None

    def _check(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters, after making sure that they are those that were fine-tuned."""
        found = {}
        for name, change in self.changes.items():
            try:
                parameter = model.get_parameter(name)
            except AttributeError:
                raise ValueError(
                    f"the adapter changes {name!r}, which the model does not have; it is for another model"
                ) from None
            if tuple(parameter.shape) != change.shape or parameter.dtype != change.values.dtype:
                raise ValueError(
                    f"{name} is {parameter.dtype} of shape {tuple(parameter.shape)}, the adapter is for "
                    f"{change.values.dtype} of shape {change.shape}"
                )
            index = change.index.to(parameter.device)
            start = checksum(read_entries(parameter, index), index)
            if start != change.start or checksum_of_rest(parameter, index) != change.frozen:
                raise ValueError(
                    f"the weights of {name} are not those that were fine-tuned (their checksum differs): merge the "
                    "adapter into the same pretrained weights, before any other change of them"
                )
            found[name] = parameter
        return found

    def _starts(self, model: nn.Module) -> Mapping[str, Tensor]:
        """The pretrained values of the changed entries: what a merge has replaced, or what is in the model."""
        if self._replaced is not None:
            return self._replaced
        parameters = self._check(model)
        return {n: read_entries(parameters[n], c.index.to(parameters[n].device)) for n, c in self.changes.items()}

    # -- file --------------------------------------------------------------------------------------

    def save(self, folder: Path | str) -> None:
        """Write the adapter alone, two files, into a folder (made where it is not there).

        Args:
            folder: where to.
        """
        tensors, parameters = {}, {}
        for name, change in self.changes.items():
            tensors[f"{name}.index"], tensors[f"{name}.values"] = change.index, change.values
            parameters[name] = {"shape": list(change.shape), "frozen": change.frozen, "start": change.start}
        save_sealed(
            folder, NAME, tensors, {"threshold": repr(self.threshold), "parameters": parameters}, version=FORMAT
        )

    @classmethod
    def load(cls, folder: Path | str) -> "SparseAdapter":
        """Read what :meth:`save` wrote; tensors on the CPU.

        Raises:
            ValueError: a file is missing, damaged, or of another format.
        """
        try:
            content, tensors = load_sealed(folder, NAME, version=FORMAT)
            changes = {
                name: Change(
                    tuple(entry["shape"]),
                    tensors[f"{name}.index"],
                    tensors[f"{name}.values"],
                    entry["frozen"],
                    entry["start"],
                )
                for name, entry in content["parameters"].items()
            }
            threshold = float(content["threshold"])
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"there is no readable adapter in {folder}: {error}") from error
        for name, change in changes.items():
            if problem := _impossible(change):
                raise ValueError(f"the adapter in {folder} cannot be: {name} has {problem}")
        return cls(changes, threshold=threshold)

    # -- elsewhere ---------------------------------------------------------------------------------

    @torch.no_grad()
    def export_peft(self, folder: Path | str, model: nn.Module, *, base_model_name: str | None = None) -> None:
        """Write a checkpoint that stock PEFT loads: ``PeftModel.from_pretrained(pretrained_model, folder)``.

        It is one of PEFT's ``SUPERTUNING`` method, the nearest that PEFT has: sparse changes of linear layers. That
        method takes the same share of every layer, so layers with fewer changes are padded with changes of zero.

        Args:
            folder: where to.
            model: the pretrained model; or the one that the adapter is merged into, as straight after training.
            base_model_name: written into PEFT's configuration; default none.

        Raises:
            ImportError: PEFT is not installed, or older than this method.
            ValueError: something else than the weight of an ``nn.Linear`` is changed, which PEFT cannot express; or the
                model does not have the pretrained weights.
        """
        try:
            from peft import SupertuningConfig
        except ImportError as error:
            raise ImportError('export_peft needs PEFT 0.21 or newer: pip install -U "regularized[peft]"') from error
        from safetensors.torch import save_file

        layers = {}
        for name, change in self.changes.items():
            owner, _, attribute = name.rpartition(".")
            if attribute != "weight" or not isinstance(model.get_submodule(owner), nn.Linear):
                raise ValueError(
                    f"PEFT has no sparse change for {name!r}: its tuners know the weights of nn.Linear alone, no "
                    'biases, convolutions, embeddings or norms. Train with include=["*_proj.weight"], say, or use '
                    "save(folder)"
                )
            layers[owner] = change
        starts = self._starts(model)
        # PEFT keeps int(numel (1 - sparsity)) entries of every layer: the largest share that occurs, rounded up.
        share = max((len(c.index) + 0.5) / _numel(c.shape) for c in layers.values())
        sparsity = max(0.0, 1.0 - share)
        tensors: dict[str, Tensor] = {}
        for owner, change in layers.items():
            count = max(int(_numel(change.shape) * (1 - sparsity)), 0)
            start = starts[f"{owner}.weight"].float().cpu()
            index = torch.zeros(count, dtype=torch.int32)
            delta = torch.zeros(count)
            index[: len(change.index)] = change.index.int().cpu()
            delta[: len(change.index)] = change.values.float().cpu() - start
            tensors[f"base_model.model.{owner}.supertuning_indices"] = index
            tensors[f"base_model.model.{owner}.supertuning_values"] = delta
        config: Any = SupertuningConfig(
            target_modules=list(layers), sparsity=sparsity, select_top=False, base_model_name_or_path=base_model_name
        )
        config.inference_mode = True
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def combine_adapters(model: nn.Module, adapters: Sequence[SparseAdapter], scales: Sequence[float]) -> SparseAdapter:
    """One adapter that makes several changes at once: ``P + scale_1 change_1 + scale_2 change_2 + ...``.

    Args:
        model: the pretrained model that all of them were trained from; none is merged.
        adapters: the adapters, of different tasks.
        scales: a factor for each; the authors use 0.6 and 0.6 for two styles.

    Returns:
        An adapter for the same pretrained model, not merged.

    Raises:
        ValueError: not one scale for each adapter; an adapter is for other weights.

    Examples:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> start = layer.weight.detach().clone()
        >>> def change(position, by):
        ...     index, rest = torch.tensor([position]), torch.tensor([1 - position])
        ...     w = start.flatten()
        ...     return SparseAdapter(
        ...         {"weight": Change((1, 2), index, w[index] + by, checksum(w[rest], rest), checksum(w[index], index))}
        ...     )
        >>> both = combine_adapters(layer, [change(0, 1.0), change(1, 2.0)], [0.5, 0.5])
        >>> both.merge(layer)
        >>> torch.allclose(layer.weight, start + torch.tensor([[0.5, 1.0]]))
        True
    """
    if len(adapters) != len(scales) or not adapters:
        raise ValueError(f"give a scale for each adapter; got {len(adapters)} adapters and {len(scales)} scales")
    for adapter in adapters:
        if adapter._replaced is not None:
            raise ValueError(
                "an adapter is merged into its model; unmerge(model) first, so that all start from the same"
            )
    checked = [adapter._check(model) for adapter in adapters]
    changes = {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.changes):
        parts = [
            (adapter.changes[name], scale, found[name])
            for adapter, scale, found in zip(adapters, scales, checked, strict=True)
            if name in adapter.changes
        ]
        parameter = parts[0][2]
        wide = torch.promote_types(parameter.dtype, torch.float32)
        index = torch.cat([change.index.to(parameter.device).long() for change, _, _ in parts])
        union, place = torch.unique(index, return_inverse=True)
        start = read_entries(parameter, union)
        learned = torch.cat([change.values.to(parameter.device, wide) for change, _, _ in parts])
        factors = torch.cat([learned.new_full((len(change.index),), scale) for change, scale, _ in parts])
        shares = factors * (learned - start.to(wide)[place])
        values = start.to(wide).index_add(0, place, shares).to(parameter.dtype)
        positions = union if parameter.numel() >= 2**31 else union.int()
        frozen = checksum_of_rest(parameter, union)
        changes[name] = Change(tuple(parameter.shape), positions, values, frozen, checksum(start, union))
    return SparseAdapter(changes)


def _impossible(change: Change) -> str:
    """What is wrong with a change that was read from a file; empty where nothing is."""
    index, values = change.index, change.values
    if index.ndim != 1 or index.dtype not in (torch.int32, torch.int64) or not values.is_floating_point():
        return f"positions of type {index.dtype} and shape {tuple(index.shape)}, and values of type {values.dtype}"
    if index.shape != values.shape:
        return f"{len(index)} positions and {values.numel()} values"
    if not all(isinstance(number, int) for number in (*change.shape, change.frozen, change.start)):
        return f"shape {change.shape} and checksums {change.frozen!r}, {change.start!r}"
    if len(index) and not 0 <= int(index.min()) <= int(index.max()) < _numel(change.shape):
        return f"positions from {int(index.min())} to {int(index.max())} in a tensor of shape {change.shape}"
    return ""


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
