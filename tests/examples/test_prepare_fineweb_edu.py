"""The script for a cluster, with a corpus of the same format that is here already."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]


def test_it_prepares_files_of_the_same_format(tmp_path: Path) -> None:
    """Columns as the dataset's card lists them; in a folder of some name, below the one where the command is given."""
    folder = tmp_path / "fineweb edu, ö" / "sample" / "10BT"
    folder.mkdir(parents=True)
    for part in range(3):
        texts = [f"Document {part} {row}. " + "It teaches something. " * 30 for row in range(40)]
        columns = {
            "text": texts,
            "id": [f"<urn:uuid:{part}-{row}>" for row in range(40)],
            "dump": ["CC-MAIN-2024-10"] * 40,
            "url": ["https://example.org"] * 40,
            "file_path": ["s3://commoncrawl"] * 40,
            "language": ["en"] * 40,
            "language_score": [0.98] * 40,
            "token_count": [100] * 40,
            "score": [3.1] * 40,
            "int_score": [3] * 40,
        }
        pq.write_table(pa.table(columns), folder / f"{part:03d}_00000.parquet")
    done = subprocess.run(
        [ROOT / "examples" / "prepare_fineweb_edu.sh", "fineweb edu, ö", "tokenizer=byte", "data.shards_dir=shards"],
        cwd=tmp_path,
        env=os.environ | {"EXECUTOR": "local", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "3  .parquet" in done.stdout
    (encoded,) = (tmp_path / "shards").glob("logs/*/*/encode/completions")
    assert len(list(encoded.iterdir())) == 3
