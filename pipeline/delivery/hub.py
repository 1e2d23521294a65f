"""Send an exported segmenter to the Hugging Face Hub, by its own client.

Reads an export folder and writes to the hub; only files that the export's record lists are sent.
"""

from __future__ import annotations

from pathlib import Path

from stages.contracts import Progress
from stages.errors import EnvironmentFailure, InputError
from stages.scoring.exported_model import CONFIG_FILE, check_files, read_export
from stages.scoring.model_card import CARD_FILE


def push_export(model: Path, repo: str, *, private: bool, message: str, progress: Progress) -> str:
    """Upload an export as one commit; the repository is made if it is not there.

    Args:
        model: Folder that ``wsss export`` wrote; every file is compared with its digest first.
        repo: OWNER/NAME.
        private: Of a repository that is made.
        message: Of the commit.
        progress: Hears what is sent.

    Returns:
        The page of the model.

    Raises:
        InputError: it is no export, no such name can be, or the hub does not take the token.
        DamagedFileError: a file differs from what was exported.
        EnvironmentFailure: the hub cannot be reached, or failed.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    folder, record = read_export(model)
    check_files(folder, record)
    names = [*record.files, CARD_FILE, CONFIG_FILE]
    if repo.count("/") != 1:
        raise InputError(f"expected a repository as OWNER/NAME, found {repo}")
    total = sum(file.size for file in record.files.values())
    progress.info(f"sending {', '.join(names)} ({total / 1e6:.1f} MB) to {repo}")
    api = HfApi(library_name="wsss-pipeline")
    try:
        page = api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=names, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"expected a repository as OWNER/NAME, found {repo} ({error})") from error
    except LocalTokenNotFoundError as error:
        raise InputError("no token for the hub; log in with `hf auth login`, or set HF_TOKEN") from error
    except HfHubHTTPError as error:
        code = error.response.status_code
        if code in (401, 403):
            raise InputError(
                f"the hub refused to write {repo} ({code}); log in with `hf auth login` (or set HF_TOKEN) by a token "
                "that may write there"
            ) from error
        raise EnvironmentFailure(f"the hub failed with {code} at {repo}; try again later") from error
    except Exception as error:
        # the client's HTTP library is requests, httpx or httpx2, by its version
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        reason = str(error) or type(error).__name__
        raise EnvironmentFailure(f"{api.endpoint} cannot be reached ({reason}); is there a network?") from error
    return str(page)
