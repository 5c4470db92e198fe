"""Tables (Parquet, Arrow) and datasets of the hub, read in batches, mostly through `datasets`; no cache copies them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config_data import HubName, SourceConfig
from trainer.data.readers import Document, no_text
from trainer.outcome import Outcome, RunError

BATCH = 256  # rows that are in memory as Python strings at once
PATIENCE = 10.0  # seconds that the hub has to say what a name means


def read_table(source: SourceConfig, file: Path, form: str, name: str) -> Iterator[Document]:
    """The documents of a Parquet or Arrow file: its rows, the text in the column `source.text_key`."""
    if form == "parquet":
        batches = _parquet(file, source.text_key)
    else:
        import datasets

        with _sentences(str(file), "check the file, or make it again"):
            stream = datasets.load_dataset(form, data_files=[str(file)], split="train", streaming=True)
            batches = stream.with_format("arrow").iter(batch_size=BATCH)
    yield from _rows(batches, source.text_key, str(file), name)


def _parquet(file: Path, key: str) -> Iterator[Any]:
    """Batches of the column `key`. `datasets` would hold a whole row group, which may be the whole file."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(file, buffer_size=1 << 20, pre_buffer=False) as table:
        columns = table.schema_arrow.names
        yield from table.iter_batches(BATCH, columns=[key] if key in columns else columns)


def read_hub(source: SourceConfig, hub: HubName) -> Iterator[Document]:
    """The documents of a dataset on the hub, or in a local folder laid out like one, streamed."""
    where = str(hub)
    with _sentences(where, "check the name, its config and its split"):
        stream = _local(hub) if hub.local else _remote(hub)
        batches = stream.with_format("arrow").iter(batch_size=BATCH)
    yield from _rows(batches, source.text_key, where, where)


def pin(hub: HubName) -> HubName:
    """The name with the commit that its revision stands for now, so that a restart reads the same text.

    Raises:
        RunError: the hub does not answer, or knows no such dataset.
    """
    if hub.local:
        return hub
    from huggingface_hub import HfApi

    with _sentences(str(hub), "check the name and the revision"):
        return hub._replace(revision=HfApi().dataset_info(hub.name, revision=hub.revision, timeout=PATIENCE).sha)


def _remote(hub: HubName) -> Any:
    import datasets

    return datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision, streaming=True)


def _local(hub: HubName) -> Any:
    """A folder with data files as on the hub, or one that `save_to_disk` wrote."""
    import datasets

    folder = Path(hub.name).expanduser()
    if not folder.is_dir():
        raise RunError(f"there is no folder {folder}", where=str(hub), mend="check the path")
    if (folder / "state.json").exists():
        return datasets.load_from_disk(str(folder))
    if (folder / "dataset_dict.json").exists():
        splits = datasets.load_from_disk(str(folder))
        if hub.split not in splits:
            raise RunError(f"there is no split {hub.split}", where=str(hub), mend=f"splits: {', '.join(splits)}")
        return splits[hub.split]
    return datasets.load_dataset(str(folder.resolve()), hub.config, split=hub.split, streaming=True)


def _rows(batches: Iterator[Any], key: str, where: str, name: str) -> Iterator[Document]:
    """The texts of batches of rows; null is no text."""
    import pyarrow

    number = 0
    with _sentences(where, "check the file, or get it again"):
        for batch in batches:
            if key not in batch.schema.names:
                raise no_text(key, where, f"columns here: {', '.join(batch.schema.names)}")
            column = batch.column(key)
            texts = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null)
            if not any(is_text(column.type) for is_text in texts):
                raise no_text(key, where, f"the column {key} holds {column.type}")
            for text in column.to_pylist():
                yield Document(f"{name}#{number}", text or "")
                number += 1


@contextmanager
def _sentences(where: str, mend: str) -> Iterator[None]:
    """Turn what the libraries raise into a sentence; they have many kinds of errors, some of them wrapped."""
    from datasets.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # they also log what they raise
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        chain = [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
            chain.append(cause)
        raise _sentence(chain, where, mend) from None
    finally:
        logging.set_verbosity(verbosity)


def _sentence(chain: list[BaseException], where: str, mend: str) -> RunError:
    kinds = {kind.__name__ for error in chain for kind in type(error).__mro__}
    text = " ".join(str(chain[0]).split())[:200]
    down = any(getattr(getattr(error, "response", None), "status_code", 0) >= 500 for error in chain)
    if down or kinds & {
        "ConnectionError",
        "ConnectError",
        "TimeoutException",
        "TransportError",
        "OfflineModeIsEnabled",
    }:
        return RunError(
            f"the hub does not answer for {where} ({text})",
            where=where,
            mend="run `orthogon data prepare CONFIG` where there is network: the table in data.folder is then found without; "
            "or copy the dataset here and give hub:./FOLDER",
            outcome=Outcome.INFRASTRUCTURE,
        )
    if "GatedRepoError" in kinds:
        return RunError(f"{where} asks for consent", where=where, mend="accept its terms on the hub, and set HF_TOKEN")
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds:
        return RunError(
            f"the hub knows no dataset {where}", where=where, mend="check the name; a private one needs HF_TOKEN"
        )
    return RunError(f"{where} cannot be read: {text}", where=where, mend=mend)
