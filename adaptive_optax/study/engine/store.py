"""The folder of a study: every finished chunk, written so that a killed study resumes where it stopped.

    study.json      the study's identity: what its trials share, and digests of every arm's programs
    looks.json      the looks so far, in order, with their plan if they have one
    details.json    what was asked for and chosen so far, for `adaptive-optax status`; nothing else reads it
    layout.json     the placement: how trials are distributed over the devices
    trials/*.npz    one file per finished chunk
    locks/*         held by the process that runs a chunk, released by the system if it dies
    died.json       trials during which a worker process died
    set_aside/*     files that could not be used; nothing reads them

Files are written under a temporary name, flushed, and renamed, so a file is complete or absent. Every file is
checked when read: one that is damaged or belongs to another study is set aside with a warning, and its trials
run again. A change that would affect the outcome of finished trials is refused with an error that names it.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock

from adaptive_optax.study.engine.chunks import (
    Identity,
    Key,
    Results,
    Unusable,
    are_same,
    digest,
    pack,
    unpack,
)

FORMAT = 2  # of the folder; increase it whenever the engine trains differently or the files change
DETAILS = "details.json"
DIED = "A worker process died in this trial"  # begins the error of one that is not tried again
ANY_RATE = "any"  # replaces the rate, for an arm whose program takes it as an argument


class ArmPrograms(NamedTuple):
    """The programs of an arm, as a study's folder identifies them.

    Attributes:
        per_rate: Whether the arm has one program per learning rate.
        digests: Returns, for a rate, the digests of its programs by purpose; the rate is None if one program
            takes any rate.
    """

    per_rate: bool
    digests: Callable[[float | None], dict[str, str]]


class Look(NamedTuple):
    """What verdicts are drawn from. Equal ones show nothing new, so they count as the same look.

    Attributes:
        seeds: The number of fresh seeds.
        baseline: The arm that the others are compared with.
        rates: Every arm's learning rate.
        plan: First and most seeds, if looks follow a plan; they share one error rate.
    """

    seeds: int
    baseline: str
    rates: dict[str, float]
    plan: tuple[int, int] | None = None


def check_folder(name: str, path: str | os.PathLike[str]) -> Path:
    """Returns the folder after creating it if needed, and checking that files can be written to it.

    Args:
        name: The argument's name, for the message.
        path: The folder.

    Raises:
        ValueError: If files cannot be written there, with the reason.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = b""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must name a folder, got {path!r}.")
    folder = Path(text)
    try:
        if folder.exists() and not folder.is_dir():
            reason = "it is a file"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(4096))
                file.flush()
                os.fsync(file.fileno())
            return folder
    except (OSError, ValueError) as error:  # a ValueError for a null character
        reason = getattr(error, "strerror", None) or str(error)
    raise ValueError(f"{name} must be a folder that can be written to, got {text!r}: {reason}.")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file that is always, even after a crash, either complete or unchanged."""
    temporary = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno is not None:
            error.filename, error.filename2 = os.fspath(path), None  # report the requested file
        raise


class Store:
    """A study's folder.

    Args:
        path: The folder; created if needed.
        description: What all trials of the study share: strings, numbers, lists and dictionaries by name.
            "environment" is a dictionary of what all programs depend on; "record shapes", if present, has the
            shapes of a trial's curves.
        arms: The arms in use. Other arms may have trials in the folder too.

    Raises:
        ValueError: If the folder cannot be used, is of another version, or belongs to a study whose finished
            trials would now come out differently. The message names what changed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        description: dict[str, Any],
        arms: Mapping[str, ArmPrograms] | None = None,
    ):
        self.path: Path = check_folder("out", path)
        self._arms = dict(arms or {})
        self._description = json.loads(json.dumps(description))
        self._study = digest(json.dumps(self._description, sort_keys=True).encode())
        self._results: Results = {}  # what has been read from the folder so far
        self._read: set[str] = set()
        # Files whose trials run again, with the time of their last change.
        self._outdated: dict[str, int] = {}
        self._notices: list[str] = []
        try:
            for folder in (self.path / "trials", self.path / "locks", self.path / "set_aside"):
                if os.path.lexists(folder) and not folder.is_dir():
                    raise ValueError(
                        f"out: {str(folder)!r} is a file where the study needs a folder; move it away, or "
                        "use another folder."
                    )
                if folder.name != "set_aside":  # created only when something is set aside
                    folder.mkdir(exist_ok=True)
            self._lock = filelock.FileLock(self.path / "locks" / "study")
            self._open()
        except (OSError, NotImplementedError) as error:  # the latter if files cannot be locked
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(
                f"out must be a folder in which files can be saved, got {str(path)!r}: {reason}."
            ) from error
        self._warn()

    def _open(self) -> None:
        with self._lock:
            before = self._load_study()
            if before is None and not self._notices and any(self.path.glob("trials/*.npz")):
                raise ValueError(
                    f"out: {str(self.path)!r} holds trials without a study.json; use another folder."
                )
            self._recorded: dict[str, dict[str, dict[str, str]]] = before["arms"] if before else {}
            if before:
                self._refuse(_changes(before["study"], self._description))
            else:
                self._save_study()
            self._looks()
        self._refuse([change for name in self._arms for change in self._changes_of_arm(name)])

    def _changes_of_arm(self, name: str) -> Iterator[str]:
        per_rate, digests = self._arms[name]
        for rate, before in self._recorded.get(name, {}).items():
            if (rate == ANY_RATE) == per_rate:
                yield f"arm {name!r} program"
                return
            now = digests(float(rate) if per_rate else None)
            changed = [what for what in now if now[what] != before.get(what)]
            if changed:
                yield f"arm {name!r} {changed[0]}" + (f" at learning rate {rate}" if per_rate else "")

    def _refuse(self, changes: Sequence[str]) -> None:
        if changes:
            raise ValueError(
                f"out: {str(self.path)!r} holds another study; changed: {', '.join(changes)}. "
                "Use another folder."
            )

    # ---- Placement and looks ----

    def placement(self, check: Callable[[Any], bool]) -> dict[str, Any] | None:
        """Returns the placement that the study began with; None if there is none or it fails the check."""

        def checked(value: Any) -> None:
            if not check(value):
                raise Unusable("holds no placement for these devices")

        with self._lock:
            placement = self._load("layout.json", checked, "the placement is chosen again")
        self._warn()
        return placement

    def settle_placement(self, placement: dict[str, Any], check: Callable[[Any], bool]) -> dict[str, Any]:
        """Saves the placement, or returns the one that another process saved first."""
        with self._lock:
            before = self.placement(check)
            if before is None:
                self._save("layout.json", placement)
            return before or placement

    def save_details(self, details: dict[str, Any]) -> None:
        """Saves what is asked for and what has been chosen, for those who watch."""
        self._save(DETAILS, details)

    def check_look(self, look: Look) -> None:
        """Refuses a look that would break the error rate of a plan; a rate may be NaN, not chosen yet.

        Raises:
            ValueError: If plan, baseline, arms or rates differ from those of the looks so far.
        """
        with self._lock:
            for before in self._looks()[:1]:
                self._check_look(before, look)

    def _check_look(self, before: Look, now: Look) -> None:
        if before.plan == now.plan is None:
            return
        if before.plan != now.plan:
            what = f"{_planned(before)}, not {_planned(now)}"
        elif before.baseline != now.baseline:
            what = f"baseline {before.baseline!r}, not {now.baseline!r}"
        elif before.rates.keys() != now.rates.keys():
            what = f"arms {', '.join(map(repr, before.rates))}, not {', '.join(map(repr, now.rates))}"
        else:
            other = [name for name, rate in now.rates.items() if before.rates[name] != rate == rate]
            if not other:
                return
            name = other[0]
            what = f"learning rate {before.rates[name]:g} of arm {name!r}, not {now.rates[name]:g}"
        raise ValueError(
            f"out: {str(self.path)!r} holds verdicts with {what}, and a plan of seeds keeps its error rate "
            "only if nothing changes after its first look. Use another folder."
        )

    def look(self, look: Look) -> list[Look]:
        """Records what a verdict is drawn from; returns the looks up to the first equal one, in order.

        Raises:
            ValueError: If this breaks the error rate of a plan.
        """
        with self._lock:
            looks = self._looks()
            for before in looks[:1]:
                self._check_look(before, look)
            if look not in looks:
                looks.append(look)
                self._save("looks.json", [_as_json(each) for each in looks])
            return looks[: looks.index(look) + 1]

    def _looks(self) -> list[Look]:
        """Reads the looks. They cannot be reconstructed; with too few, verdicts would err too often."""
        try:
            looks = self._read_json("looks.json")
            _check_looks(looks)
        except FileNotFoundError:
            return []
        except Unusable as error:
            raise ValueError(
                f"out: {str(self.path / 'looks.json')!r} {error}: it counts the verdicts drawn so far, and "
                "each of them makes the next one stricter. Restore a copy, or use another folder; delete it "
                "only if no verdict was seen."
            ) from error
        return [Look(**look | {"plan": tuple(look["plan"])} if "plan" in look else look) for look in looks]

    # ---- Trials ----

    def admit(self, keys: Sequence[Key]) -> None:
        """Records the programs of trials that are about to run.

        Raises:
            ValueError: If another process has recorded different ones.
        """
        for key in keys:
            self._programs(key)

    def read(self) -> Results:
        """Reads the chunks finished since the last call; unusable files are set aside."""
        found: Results = {}
        for path in self._new_files():
            self._read.add(path.name)
            try:
                chunk = self._accept(path)
            except Unusable:
                with self._lock:  # another process may have repaired it in the meantime
                    try:
                        chunk = self._accept(path)
                    except Unusable as error:
                        self._set_aside(path, error, "its trials run again")
                        chunk = None
            if chunk is None:
                self._read.discard(path.name)
                continue
            self._results |= chunk
            found |= chunk
        self._warn()
        return found

    def write(self, results: Results) -> None:
        """Writes a finished chunk."""
        path = self._file_of(results)
        write_atomically(path, pack(results, self._known_identity))
        self._read.add(path.name)
        self._results |= results

    def _file_of(self, keys: Iterable[Key]) -> Path:
        return self.path / "trials" / (digest(repr(sorted(keys)).encode()) + ".npz")

    def forget_raised(self) -> list[Key]:
        """Forgets the trials that raised, so that they run again; their files stay until then."""
        errors = {key: str(curves.error) for key, curves in self._results.items()}
        forgotten = [key for key, error in errors.items() if error and not error.startswith(DIED)]
        for key in forgotten:
            del self._results[key]
            path = self._file_of([key])
            with contextlib.suppress(OSError):
                self._outdated[path.name] = path.stat().st_mtime_ns
                self._read.discard(path.name)  # another process may replace it
        return forgotten

    def suspected(self) -> set[Key]:
        """The trials during which a worker process died."""
        try:
            return {Key(str(arm), float(rate), int(seed)) for arm, rate, seed in self._read_json("died.json")}
        except (FileNotFoundError, Unusable, TypeError, ValueError):  # it only orders the trials
            return set()

    def suspect(self, keys: Iterable[Key]) -> None:
        """Records trials during which a worker process died, so that they run last and alone."""
        with self._lock:
            self._save("died.json", sorted(self.suspected() | set(keys)))

    def count(self, keys: Sequence[Key]) -> int:
        """How many of these trials are known to be in the folder."""
        return sum(key in self._results for key in keys)

    @contextlib.contextmanager
    def claim(self, keys: list[Key]) -> Iterator[bool]:
        """Claims a chunk; yields whether it was free, and releases it at the end."""
        lock = filelock.FileLock(self.path / "locks" / digest(repr(keys).encode()))
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _new_files(self) -> list[Path]:
        """The files not yet read, in the order in which they were finished."""
        ages = {}
        for path in self.path.glob("trials/*.npz"):
            with contextlib.suppress(FileNotFoundError):  # another process has set it aside
                changed = path.stat().st_mtime_ns
                if path.name not in self._read and self._outdated.get(path.name) != changed:
                    ages[path] = changed, path.name
        return sorted(ages, key=lambda path: ages[path])

    def _accept(self, path: Path) -> Results | None:
        """Reads and checks a chunk; returns None if the file has disappeared."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise Unusable(f"cannot be read ({error.strerror})") from error
        results = unpack(data, self._identity, self._description.get("record shapes"))
        for key, curves in results.items():
            if not are_same(self._results.get(key, curves), curves):
                raise Unusable("contradicts trials that finished earlier")
        return results

    def _identity(self, key: Key) -> Identity | None:
        programs = self._programs(key)
        if programs is None:
            return None
        return Identity(self._study, digest(json.dumps(programs, sort_keys=True).encode()))

    def _known_identity(self, key: Key) -> Identity:
        identity = self._identity(key)
        assert identity is not None, key
        return identity

    def _programs(self, key: Key) -> dict[str, str] | None:
        """The digests of a trial's programs, recorded the first time; None for an unknown arm."""

        def recorded() -> dict[str, str] | None:
            of_arm = self._recorded.get(key.arm, {})
            return of_arm.get(ANY_RATE) or of_arm.get(repr(key.rate))

        found = recorded()
        if found is not None:
            return found
        now = None
        if key.arm in self._arms:
            per_rate, digests = self._arms[key.arm]
            now = {repr(key.rate): digests(key.rate)} if per_rate else {ANY_RATE: digests(None)}
        with self._lock:
            study = self._load_study()
            if study is not None:  # other processes add arms and rates
                self._recorded = study["arms"] | {
                    name: rates | study["arms"].get(name, {}) for name, rates in self._recorded.items()
                }
            found = recorded()
            if found is None and now is not None:
                self._recorded[key.arm] = self._recorded.get(key.arm, {}) | now
            if study is None or self._recorded != study["arms"]:
                self._save_study()
        if now is not None:
            self._refuse(list(self._changes_of_arm(key.arm)))
        return recorded()

    # ---- Files ----

    def _load_study(self) -> dict[str, Any] | None:
        def check(value: Any) -> None:
            if not isinstance(value, dict):
                raise Unusable("does not describe a study")
            version = value.get("format", 1 if "steps" in value else None)
            if type(version) is int and version != FORMAT:
                raise ValueError(
                    f"out: {str(self.path)!r} was written by another version of the study (format {version}, "
                    f"this one has {FORMAT}), whose trials cannot be used; use another folder."
                )
            _check_study(value)

        return self._load("study.json", check, "it is written again")

    def _save_study(self) -> None:
        self._save("study.json", {"format": FORMAT, "study": self._description, "arms": self._recorded})

    def _read_json(self, name: str) -> Any:
        try:
            return json.loads((self.path / name).read_bytes().decode())
        except FileNotFoundError:  # distinct from a file that holds null
            raise
        except OSError as error:
            raise Unusable(f"cannot be read ({error.strerror})") from error
        except (ValueError, RecursionError) as error:
            raise Unusable("is damaged") from error

    def _load(self, name: str, check: Callable[[Any], None], consequence: str) -> Any:
        """Reads and checks a file; returns None if there is none, or if it had to be set aside."""
        try:
            value = self._read_json(name)
            check(value)
            return value
        except FileNotFoundError:
            return None
        except Unusable as error:
            self._set_aside(self.path / name, error, consequence)
            return None

    def _save(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, (json.dumps(value, indent=2) + "\n").encode())

    def _set_aside(self, path: Path, reason: Unusable, consequence: str) -> None:
        folder = self.path / "set_aside"
        target, count = folder / path.name, 0
        try:
            folder.mkdir(exist_ok=True)
            while target.exists():
                count += 1
                target = folder / f"{path.stem}.{count}{path.suffix}"
            os.replace(path, target)
        except FileNotFoundError:  # another process has set it aside
            return
        except OSError as error:
            raise ValueError(
                f"out: {str(path)!r} {reason}, and cannot be moved to {str(folder)!r} ({error.strerror}); "
                "move it away, or use another folder."
            ) from error
        self._notices.append(
            f"out: {str(path)!r} {reason}; it was moved to {str(target)!r}, and {consequence}."
        )

    def _warn(self) -> None:
        notices, self._notices = self._notices, []
        for notice in notices:
            warnings.warn(notice, stacklevel=3)


# ---- The content of the JSON files ----


def _check_study(value: dict[str, Any]) -> None:
    if not (
        value.keys() == {"format", "study", "arms"}
        and type(value["format"]) is int
        and isinstance(value["study"], dict)
        and isinstance(value["study"].get("environment", {}), dict)
        and isinstance(value["arms"], dict)
        and all(_are_programs(rates) for rates in value["arms"].values())
    ):
        raise Unusable("does not describe a study")


def _are_programs(rates: Any) -> bool:
    return isinstance(rates, dict) and all(
        (rate == ANY_RATE or _is_rate(rate))
        and isinstance(digests, dict)
        and digests
        and all(isinstance(each, str) for each in digests.values())
        for rate, digests in rates.items()
    )


def _is_rate(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _as_json(look: Look) -> dict[str, Any]:
    return {name: value for name, value in look._asdict().items() if name != "plan" or value}


def _planned(look: Look) -> str:
    return f"seeds={look.seeds}" if look.plan is None else "seeds=Sequential({}, {})".format(*look.plan)


def _check_looks(value: Any) -> None:
    def is_look(look: Any) -> bool:
        return (
            isinstance(look, dict)
            and look.keys() | {"plan"} == set(Look._fields)
            and type(look["seeds"]) is int
            and look["seeds"] > 0
            and isinstance(look["rates"], dict)
            and isinstance(look["baseline"], str)
            and look["baseline"] in look["rates"]
            and all(isinstance(rate, float) and 0 < rate < float("inf") for rate in look["rates"].values())
            and ("plan" not in look or is_plan(look["plan"]))
        )

    def is_plan(plan: Any) -> bool:
        return isinstance(plan, list) and len(plan) == 2 and all(type(seeds) is int for seeds in plan)

    if not (isinstance(value, list) and value and all(map(is_look, value))):  # created at the first look
        raise Unusable("does not list looks")
    if any(look in value[:i] for i, look in enumerate(value)):
        raise Unusable("lists a look twice")
    if any(look.get("plan") != value[0].get("plan") for look in value):
        raise Unusable("lists looks of several plans")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Names what differs; only the environment if that differs, as it changes the programs too."""
    environments = [each.get("environment", {}) for each in (before, now)]
    if environments[0] != environments[1]:
        before, now = environments
    changes = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = before.get(name), now.get(name)
        if old != new and name != "record shapes":  # which follow from other entries
            hashes = all(value is None or name.endswith(("program", "data", "code")) for value in (old, new))
            is_long = len(repr((old, new))) > 100
            changes.append(name if hashes or is_long else f"{name} (was {old}, is {new})")
    return changes
