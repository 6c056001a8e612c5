"""Uploading an exported folder to the Hugging Face Hub (or HF_ENDPOINT): only when asked, and said before."""

import re
from pathlib import Path

from thunderhead import extras
from thunderhead.core.config import ConfigError, Problem, first_line
from thunderhead.terminal import say, size


def problems(repository: str) -> list[Problem]:
    """What stands in the way of an upload to `user/name`, before there is anything to upload."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return [Problem("push", f"needs huggingface_hub: {extras.install('huggingface')}")]
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repository, re.ASCII):
        return [Problem("push", f"{repository!r} is no repository of the hub: write user/name")]
    if not huggingface_hub.get_token():
        return [Problem("push", "no token of huggingface.co is saved here: run `hf auth login`, or set HF_TOKEN")]
    try:
        huggingface_hub.HfApi().whoami()
    except (HfHubHTTPError, OSError) as error:
        return [Problem("push", f"the hub does not let you in ({first_line(error)}): leave push out, or try later")]
    return []


def upload(folder: Path, repository: str, private: bool) -> None:
    """Make the repository if it is not there, and put the folder into it as one commit; says so before.

    Raises ConfigError if the hub refuses; the folder stays.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    api = huggingface_hub.HfApi()
    place = f"{api.endpoint}/{repository}"
    n_bytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say(f"Uploading {size(n_bytes)} to {place} ({'private' if private else 'public'} if it is new)")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export from Thunderhead")
    except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:  # the last if one of the files fails
        again = f"hf upload {repository} {folder}"
        raise ConfigError([Problem("push", f"{first_line(error)}; {folder} is complete: {again}")]) from error
    say(f"Uploaded: {place}")
