"""Repositories in memory: commits that are whole trees, and branches, tags and pull requests that point to them."""

import hashlib
import itertools
import re
from dataclasses import dataclass, field


LARGE_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".pt",
    ".parquet",
    ".npz",
    ".npy",
    ".h5",
    ".hdf5",
    ".zip",
    ".gz",
    ".png",
    ".jpg",
    ".model",
    ".arrow",
)


class HubError(Exception):
    """An answer other than success, with the headers by which the clients tell errors apart."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code


@dataclass(frozen=True)
class Blob:
    """A file's content."""

    data: bytes
    large: bool

    @property
    def oid(self) -> str:
        """Hash of the blob that git stores: for a large file, that of its pointer."""
        data = self.data
        if self.large:
            data = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    oid: str
    files: dict[str, Blob]
    title: str
    parent: str | None
    author: str


@dataclass
class Repository:
    """One repository, with the files of every commit; `large` has those that are downloaded from elsewhere."""

    kind: str
    repo_id: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    large: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    pulls: dict[str, str] = field(default_factory=dict)
    _counter: itertools.count = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LARGE_SUFFIXES)
        files = {".gitattributes": Blob(attributes.encode(), large=False)}
        self.branches["main"] = self.add(files, "initial commit", None, "system").oid

    def add(self, files: dict[str, Blob], title: str, parent: str | None, author: str) -> Commit:
        """A new commit; no branch points to it yet."""
        text = f"{self.kind} {self.repo_id} {next(self._counter)} {title} {parent} {sorted(files)}"
        commit = Commit(hashlib.sha1(text.encode()).hexdigest(), files, title, parent, author)
        self.commits[commit.oid] = commit
        return commit

    def resolve(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag, pull request, or whole or abbreviated commit means."""
        plain = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for names, name in ((self.branches, plain), (self.tags, plain), (self.pulls, revision)):
            if name in names:
                return self.commits[names[name]]
        found = [oid for oid in self.commits if re.fullmatch("[0-9a-f]{7,40}", revision) and oid.startswith(revision)]
        if len(found) == 1:
            return self.commits[found[0]]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """Names and contents, without the `.gitattributes` that every repository starts with."""
        found = self.resolve(revision).files.items()
        return {name: blob.data for name, blob in sorted(found) if name != ".gitattributes"}

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits = [self.resolve(revision)]
        while (parent := commits[-1].parent) is not None:
            commits.append(self.commits[parent])
        return commits

    def replace(self, name: str, data: bytes, branch: str = "main") -> str:
        """Commits another content of a file, as somebody else would; returns the commit."""
        parent = self.resolve(branch)
        blob = Blob(data, large=name.endswith(LARGE_SUFFIXES))
        files = {**parent.files, name: blob}
        self.large[blob.sha256] = data
        commit = self.add(files, f"Replace {name}", parent.oid, "somebody")
        self.branches[branch] = commit.oid
        return commit.oid


@dataclass(frozen=True)
class User:
    """Who a token belongs to, and where it may write."""

    name: str
    organisations: tuple[str, ...] = ()
    may_write: bool = True

    @property
    def namespaces(self) -> tuple[str, ...]:
        return (self.name, *self.organisations)


@dataclass
class Store:
    """Everything that the server keeps."""

    users: dict[str, User]
    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def user(self, token: str | None) -> User | None:
        """Who asks; nobody without a token."""
        if token is None:
            return None
        if token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users[token]

    def find(self, kind: str, repo_id: str, user: User | None) -> Repository:
        """A repository, for somebody who may know of it."""
        repository = self.repositories.get((kind, repo_id))
        if repository is None or (repository.private and not self.belongs(repo_id, user)):
            if user is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def readable(self, kind: str, repo_id: str, user: User | None) -> Repository:
        """A repository, for somebody who wants its files."""
        repository = self.find(kind, repo_id, user)
        if repository.gated and not self.belongs(repo_id, user):
            raise HubError(403 if user else 401, f"Access to {kind} {repo_id} is restricted.", "GatedRepo")
        return repository

    def writable(self, kind: str, repo_id: str, user: User | None, *, pull_request: bool = False) -> Repository:
        """A repository, for somebody who wants to change it; anybody may open a pull request."""
        repository = self.find(kind, repo_id, user)
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if not user.may_write:
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if not (pull_request or self.belongs(repo_id, user)):
            raise HubError(
                403, f"Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request in {repo_id}"
            )
        return repository

    @staticmethod
    def belongs(repo_id: str, user: User | None) -> bool:
        return user is not None and repo_id.split("/")[0] in user.namespaces
