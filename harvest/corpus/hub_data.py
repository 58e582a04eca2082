"""Documents of a Hub dataset, streamed by the package `datasets` without a copy on the disk.

The dataset is pinned to its present commit first, so that a missing network, a missing dataset or a
missing token shows at once instead of after many retries. A dataset's own code is never run.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)

from ...errors import HarvestError
from ...hub import HUB_TIMEOUT_S, errors_behind, gated
from .document import Column, Counts, Document, documents_of_rows

ELSE = "or give --data FILE-OR-FOLDER, or --data stdlib (Python's own texts)"


class HubDataset:
    """The documents of one split of a dataset."""

    def __init__(self, hub_id: str, *, config: str | None, split: str, column: Column) -> None:
        """Find the dataset, its config and its split.

        Raises:
            HarvestError: `datasets` is not installed, the Hub cannot be reached, or it has no such
                dataset, config or split for this user.
        """
        if find_spec("datasets") is None:
            raise HarvestError(
                f"data {hub_id} needs the package datasets: pip install 'lorsa[datasets]', {ELSE}"
            )
        self._id, self._column = hub_id, column
        revision = _present_commit(hub_id)
        self._stream = self._open(config, split, revision)
        names = self._stream.column_names
        if names is not None and column.name not in names:
            raise column.missing(hub_id, names)
        if names is not None:  # images and the like are not decoded
            wanted = [name for name in names if name in (column.name, "id")]
            self._stream = self._stream.select_columns(wanted)
        self.facts = {"data_config": config, "data_split": split, "data_revision": revision}
        self.problem: HarvestError | None = None

    def _open(self, config: str | None, split: str, revision: str) -> Any:
        import datasets

        datasets.disable_progress_bars()
        try:
            splits = datasets.load_dataset(self._id, config, streaming=True, revision=revision)
        except Exception as error:  # whatever a dataset leads to; LORSA_DEBUG=1 shows it
            raise self._explain(error, config, revision) from error
        if split not in splits:
            raise HarvestError(
                f"data {self._id} has no split {split!r}; there is {', '.join(splits)}: choose one "
                "by --data-split"
            )
        return splits[split]

    def read(self, rng: Any, counts: Counts) -> Iterator[Document]:
        """Yield the documents of the split, its files in an order drawn from rng."""
        stream = self._stream.shuffle(seed=rng.getrandbits(32), buffer_size=1)  # files alone
        rows = self._rows(iter(stream))
        yield from documents_of_rows(rows, self._column, where=self._id, counts=counts)

    def _rows(self, stream: Iterator[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield name and fields of rows; the name is the row's own id if it has one."""
        number = 0
        while True:
            try:
                row = next(stream, None)
            except Exception as error:  # of the network, or of a file
                raise self._explain(error) from error
            if row is None:
                return
            own = row.get("id")
            yield f"{self._id}:{own if isinstance(own, str) else number}", row
            number += 1

    def _explain(
        self, error: Exception, config: str | None = None, revision: str | None = None
    ) -> HarvestError:
        """Return the error whose line says what failed and what to do."""
        kinds = tuple(type(reason) for reason in errors_behind(error))
        if GatedRepoError in kinds or _says(error, "gated dataset"):
            return HarvestError(gated(f"data {self._id}"))
        if any(issubclass(kind, ConnectionError | TimeoutError) for kind in kinds):
            return _unreachable(self._id)
        if _says(error, "dataset scripts"):
            return HarvestError(
                f"data {self._id} needs code of its own, which is never run: give another dataset"
            )
        if revision is not None and (configs := self._configs(revision, config)):
            wrong = "several configs" if config is None else f"no config {config!r}"
            return HarvestError(
                f"data {self._id} has {wrong}; there is {', '.join(configs)}: choose one by "
                "--data-config"
            )
        return HarvestError(f"data {self._id} cannot be read: {_first_line(error)[:300]}")

    def _configs(self, revision: str, failed: str | None) -> list[str]:
        """Return the dataset's configs; none if the one that failed is among them."""
        import datasets

        try:
            names = datasets.get_dataset_config_names(self._id, revision=revision)
        except Exception:  # then the first error is reported
            return []
        is_there = len(names) < 2 if failed is None else failed in names
        return [] if is_there else list(names)


def _present_commit(hub_id: str) -> str:
    try:
        return str(HfApi().dataset_info(hub_id, timeout=HUB_TIMEOUT_S).sha)
    except GatedRepoError:
        raise HarvestError(gated(f"data {hub_id}")) from None
    except RepositoryNotFoundError:
        raise HarvestError(
            f"data {hub_id}: no such file or folder, and no such dataset on the Hub, unless it is "
            "private: check the spelling, or run: hf auth login"
        ) from None
    except (HfHubHTTPError, HFValidationError) as error:
        raise HarvestError(f"data {hub_id}: the Hub answered {_first_line(error)}") from None
    except Exception:  # the HTTP library, and so its errors, change with the version of the Hub's
        raise _unreachable(hub_id) from None


def _unreachable(hub_id: str) -> HarvestError:
    return HarvestError(f"data {hub_id}: the Hub cannot be reached; connect and try again, {ELSE}")


def _says(error: Exception, word: str) -> bool:
    return word in str(error).lower()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
