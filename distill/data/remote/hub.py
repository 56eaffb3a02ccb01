"""Objects of a data set on the Hugging Face hub: `hf://datasets/ORG/NAME[@REVISION][/FOLDER]`.

An object is one request, not parts: the hub counts requests (5,000 in 5 minutes of a free account), and huggingface_hub waits
as long as its answers say and goes on where a body broke off.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from distill.data.remote.fetch import Busy, Denied, Facts, FetchError, Missing, Trip, denied, retried

PLACE = re.compile(r"hf://datasets/(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<folder>.+))?")

Result = TypeVar("Result")


class HubRemote:
    """A folder of a data set's repository. A listing pins it: `url` then names the commit, and so do all requests."""

    def __init__(self, url: str) -> None:
        found = PLACE.fullmatch(url)
        if found is None:
            raise ValueError(f"{url}: no data set of the hub; give hf://datasets/ORG/NAME[@REVISION][/FOLDER]")
        try:
            import huggingface_hub
        except ModuleNotFoundError as error:
            raise ValueError(f"{url}: the package huggingface_hub reads it and is not installed; install it") from error
        self.url = url
        self._hub: Any = huggingface_hub
        self._repository = found["repository"]
        self._revision = found["revision"] or "main"
        self._folder = found["folder"] or ""

    def facts(self, name: str) -> Facts:
        """The answer to a HEAD request, which the hub gives to those only who may have the object."""
        found = self._asked(name, lambda: self._hub.get_hf_file_metadata(self._address(name, self._revision)))
        return Facts(found.size or 0, found.etag or "", found.commit_hash or "")

    def listing(self) -> dict[str, Facts]:
        """The tree of the folder at the commit that the revision means now; sha256 is the ETag of large files."""
        api, kind = self._hub.HfApi(), {"repo_type": "dataset"}

        def tree() -> tuple[str, list[Any]]:
            commit = api.repo_info(self._repository, revision=self._revision, **kind).sha
            where = {"path_in_repo": self._folder or None, "recursive": True, "revision": commit}
            return commit, list(api.list_repo_tree(self._repository, **where, **kind))

        commit, entries = self._asked("", tree)
        self._revision = commit
        self.url = "/".join(filter(None, [f"hf://datasets/{self._repository}@{commit}", self._folder]))
        files = [entry for entry in entries if hasattr(entry, "blob_id")]
        skip = len(self._folder) + 1 if self._folder else 0
        return {file.path[skip:]: Facts(file.size, file.lfs.sha256 if file.lfs else file.blob_id, commit) for file in files}

    def fetch(self, name: str, facts: Facts, file: int, trip: Trip) -> None:
        """One stream, of the commit of `facts`."""
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers
        from huggingface_hub.utils.tqdm import silent_tqdm

        url, size = self._address(name, facts.version or self._revision), None if facts.size < 0 else facts.size

        def copy() -> None:
            trip.advance(-trip.arrived)
            bar: Any = silent_tqdm
            with _Counting(file, trip) as target:
                # no bars: eight processes would write theirs over each other
                http_get(url, target, headers=build_hf_headers(), expected_size=size, tqdm_class=bar)

        retried(lambda: self._asked(name, copy), trip.stop)

    def _address(self, name: str, revision: str) -> str:
        path = "/".join(filter(None, [self._folder, name]))
        return str(self._hub.hf_hub_url(self._repository, path, repo_type="dataset", revision=revision))

    def _asked(self, name: str, action: Callable[[], Result]) -> Result:
        """The result of a request, whose errors become ours."""
        from huggingface_hub import constants, errors

        url = f"{self.url}/{name}".rstrip("/")
        try:
            return action()
        except FetchError:
            raise
        except errors.GatedRepoError as error:
            page = f"{constants.ENDPOINT}/datasets/{self._repository}"
            raise Denied(f"{url}: the data set is gated: ask for access at {page}, then give a token as HF_TOKEN") from error
        except errors.OfflineModeIsEnabled as error:
            raise FetchError(f"{url}: HF_HUB_OFFLINE is set in the environment; unset it to read from the hub") from error
        except errors.HfHubHTTPError as error:
            status = 0 if error.response is None else error.response.status_code
            said = str(error).strip().splitlines()[0]
            if status in (401, 403):
                raise denied(url, "hf", f"{said} (or there is no such data set)") from error
            if status == 404:
                raise Missing(f"{url}: not there ({said})") from error
            raise Busy(f"{url}: {said}") from error
        except OSError as error:  # a body of another size, after huggingface_hub's own repetitions
            raise Busy(f"{url}: {str(error).strip().splitlines()[0]}") from error
        except Exception as error:  # its HTTP library's own, whose name changes with its versions
            if "httpx" not in type(error).__module__:
                raise
            raise Busy(f"{url}: no answer ({error!r})") from error


class _Counting(io.FileIO):
    """A view of a descriptor, from its start, that counts what is written; the descriptor stays open."""

    def __init__(self, file: int, trip: Trip) -> None:
        super().__init__(os.dup(file), "wb")
        self.seek(0)
        self._trip = trip

    def write(self, data: Any) -> int:
        """Writes a block. Raises FetchError where the download was stopped."""
        if self._trip.stop.is_set():
            raise FetchError("stopped")
        count = super().write(data)
        self._trip.advance(count)
        return count
