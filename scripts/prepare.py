#!/usr/bin/env python
"""What the recipes prepare_*.sh need beside fairseq-preprocess.

    python scripts/prepare.py run prepare_NAME.sh OPTION …         # each recipe begins with it
    python scripts/prepare.py take SOURCE TARGET=NAME …            # files of a folder, tar or zip, checked
    python scripts/prepare.py pairs text/train=29000 …             # beside what is published
    python scripts/prepare.py tokens data-bin train=103227021 … types=267744

`run` finds or downloads the source, then runs the recipe in the folder OUT.partial, which becomes OUT in one rename:
so OUT is complete or absent, whatever kills it. What is in OUT is never changed or deleted; OUT/.complete has the
settings and the files that were made. The recipe finds its options in its environment: $SOURCE, $WORKERS, …
"""

from __future__ import annotations

import argparse
import fcntl
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # fairseq may not be installed yet: this says so
from multimax_fairseq.tools import ArgumentParser, UserError, errors_in_a_line, positive  # noqa: E402

MARKER = ".complete"
UNREADABLE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)


class Recipe(NamedTuple):
    """What `run` has to know of a recipe.

    Attributes:
        options: of its own: name → default and help.
        files: what is downloaded otherwise: name → SHA-256, or None; that of the text in a .gz.
        urls: where the files are, between blanks; a file called NAME is at URL/NAME.
        folder: of $MULTIMAX_DATA, the source if there is none.
    """

    options: dict[str, tuple[Any, str]] = {}
    files: dict[str, str | None] = {}
    urls: str = ""
    folder: str | None = None


MULTI30K = {
    "train.de.gz": "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    "train.en.gz": "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    "val.de.gz": "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    "val.en.gz": "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    "test_2016_flickr.de.gz": "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    "test_2016_flickr.en.gz": "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
}
WIKITEXT = {
    "wikitext-103-v1.zip": "242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
    "wikitext-2-v1.zip": "92675f1d63015c1c8b51f1656a52d5bdbc33aafa60cc47a218a66e7ee817488c",
}
RECIPES = {
    "demo": Recipe({"seed": (1, "of the generator")}),
    "multi30k": Recipe({"vocab-size": (6000, "SentencePiece pieces, joint for both languages")}, MULTI30K,
                       "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw", "multi30k"),
    "iwslt14": Recipe({"merges": (10000, "of joint BPE")}, {"de-en.tgz": None},  # fairseq publishes no checksum
                      "http://dl.fbaipublicfiles.com/fairseq/data/iwslt14"),
    "wikitext103": Recipe({"corpus": (("wikitext-103", "wikitext-2"), "the large one, or the small one")}, WIKITEXT,
                          "https://wikitext.smerity.com https://s3.amazonaws.com/research.metamind.io/wikitext"),
    "text_lm": Recipe({"min-count": (0, "words seen fewer times in the training text become <unk>; WikiText has its "
                                     "own <unk>")}, folder="brown"),
}


# ---------------------------------------------------------------------- run: from the command line to a folder


def parse_options(script: Path, arguments: tuple[str, ...]) -> tuple[str, argparse.Namespace]:
    name = script.stem.removeprefix("prepare_")
    recipe = RECIPES[name]
    header = [line[2:] for line in script.read_text(encoding="utf-8").split("\n\n")[0].splitlines()[1:]]
    parser = ArgumentParser("\n".join(header), prog=script.name, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the result goes")
    parser.set_defaults(source=None, url=None)
    sources = parser.add_mutually_exclusive_group()
    usual = f" (default: $MULTIMAX_DATA/{recipe.folder}, if it is there)" if recipe.folder else ""
    if recipe.urls or recipe.folder:
        sources.add_argument("--from", "--archive", type=Path, metavar="PATH", dest="source",
                             help=f"the files, in a folder, tar or zip{usual}")
    if recipe.urls:
        sources.add_argument("--url", help="download from there: the addresses of an archive, between blanks, or "
                             f"that of a folder with several files (default: {recipe.urls})")
    for option, (default, text) in recipe.options.items():
        kind = {"choices": default} if isinstance(default, tuple) else {"type": positive, "metavar": "N"}
        first = default[0] if isinstance(default, tuple) else default
        parser.add_argument(f"--{option}", default=first, help=f"{text} (default: %(default)s)", **kind)
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="processes (default: 2)")
    return name, parser.parse_args(arguments)


def run(file: str, *arguments: str) -> None:
    """Make --out by the recipe, unless it is there.

    Raises:
        UserError: the options, the source or the folder do not allow it.
    """
    script = Path(file)
    name, args = parse_options(script, arguments)
    recipe, out = RECIPES[name], Path(os.path.realpath(args.out))
    need_commands(name)
    source, addresses = args.source, {}
    settings = {"recipe": name, **{option: getattr(args, option.replace("-", "_")) for option in recipe.options}}
    usual = Path(os.environ.get("MULTIMAX_DATA") or "/nowhere", recipe.folder or "")
    if recipe.folder and not source and not args.url and usual.is_dir():
        source = usual
    if source:
        source = source.resolve()
        settings["source"] = digests(source)
    elif recipe.urls:
        settings["source"] = args.url or recipe.urls
        files = [f"{args.corpus}-v1.zip"] if name == "wikitext103" else recipe.files
        whole = args.url and len(files) == 1  # the address of the archive itself
        addresses = {file: [url if whole else f"{url.rstrip('/')}/{file}" for url in settings["source"].split()]
                     for file in files}
    elif recipe.folder:
        raise UserError("--from PATH is required; see --help")

    if not is_prepared(out, settings):
        with partial_folder(out) as (build, lock):
            if not is_prepared(out, settings):  # by the run that we have waited for
                if addresses:
                    source = fetch(addresses, build / "download", recipe)
                options = {option.upper().replace("-", "_"): str(value) for option, value in vars(args).items()}
                run_recipe(script, build, lock, {**options, "SOURCE": str(source)})
                shutil.rmtree(build / "download", ignore_errors=True)
                made = {"settings": settings, "files": files_of(build)}
                (build / MARKER).write_text(json.dumps(made, indent=1) + "\n")
                os.sync()
                os.rename(build, out)  # unlike mv, never into a folder
                print(f"done: {args.out} (train with: fairseq-train {args.out}/data-bin …)")
                return
    print(f"already prepared: {args.out}")


def need_commands(name: str) -> None:
    """Raise UserError if something is not installed."""
    if shutil.which("fairseq-preprocess") is None:
        raise UserError("fairseq-preprocess was not found: activate the environment that holds fairseq, or install "
                        f"it: {sys.executable} -m pip install ve-fairseq")
    for module in ("sacremoses", "subword_nmt") if name == "iwslt14" else ():
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the Python module {module!r} is missing: pip install '.[iwslt14]'")


def run_recipe(script: Path, build: Path, lock: int, variables: dict[str, str]) -> None:
    """Run the recipe in `build`, with all that it starts in a process group that ends with us.

    Raises:
        UserError: a command of it has failed.
    """
    process = subprocess.Popen(
        ["bash", str(script.resolve())], cwd=build, start_new_session=True, stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHON": sys.executable, **variables, "PREPARING": "yes"}, pass_fds=[lock],
    )
    try:
        status = process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    log = build / "log"  # of fairseq-preprocess; all others say themselves what is wrong
    if status and not log.exists():
        sys.exit(status)
    if status:
        print(*log.read_text(errors="replace").splitlines()[-15:], sep="\n", file=sys.stderr)
        raise UserError(f"{script.name} failed (exit status {status}): its last lines are above")
    log.unlink()


# ---------------------------------------------------------------------- complete or absent


@contextmanager
def partial_folder(out: Path) -> Iterator[tuple[Path, int]]:
    """OUT.partial, empty, and an open file that locks it; waits for another run's, and takes over a killed one's."""
    build = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = None
    while lock is None or not is_at(lock, build):  # what we have waited for has become OUT
        build.mkdir(exist_ok=True)
        lock = os.open(build, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run is at work on {out}: waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        for path in build.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        yield build, lock
    finally:
        deadline = time.monotonic() + 5  # what was killed may still be writing
        while is_at(lock, build) and time.monotonic() < deadline:
            shutil.rmtree(build, ignore_errors=True)
        os.close(lock)


def is_at(lock: int, path: Path) -> bool:
    return path.exists() and path.stat().st_ino == os.fstat(lock).st_ino


def files_of(folder: Path) -> dict[str, int]:
    """Path → size of the files below a folder, but for the marker."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))
            if not path.is_dir() and path != folder / MARKER}


def is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` was made with these settings, and is as it was made.

    Raises:
        UserError: it is something else, which is not to be touched.
    """
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return False
    if not (out / MARKER).is_file():
        raise UserError(f"{out} is there and was not made by this script: choose another --out")
    try:
        made = json.loads((out / MARKER).read_text(encoding="utf-8"))
        there, files = dict(made["settings"]), dict(made["files"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out / MARKER} is damaged, so nobody knows what {out} holds: remove the folder") from None
    different = [key for key in settings if settings[key] != there.get(key)]
    if different:
        said = "; ".join(f"{key}: there {there.get(key)}, asked for {settings[key]}" for key in different)
        raise UserError(f"{out} was prepared with other settings or another source ({said}): choose another --out, "
                        "or remove the folder")
    found = files_of(out)
    changed = sorted(name for name, size in files.items() if found.get(name) != size)
    if changed:
        raise UserError(f"files in {out} are missing or not as they were made ({', '.join(changed[:3])}): remove the "
                        "folder, and prepare it again")
    return True


# ---------------------------------------------------------------------- sources


def sha256(path: Path, uncompressed: bool = False) -> str:
    digest = hashlib.sha256()
    with (gzip.open if uncompressed else open)(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digests(source: Path) -> dict[str, str] | str:
    """SHA-256 of an archive, or of each text of a folder by name."""
    if source.is_dir():
        texts = (path for path in sorted(source.iterdir()) if re.search(r"\.(de|en|tokens|xml)(\.gz)?$", path.name))
        return {path.name: sha256(path) for path in texts if path.is_file()}
    return sha256(source)


def fetch(addresses: dict[str, list[str]], folder: Path, recipe: Recipe) -> Path:
    """Download each file, from its first address that has it, to a folder; returns it, or the archive in it.

    Raises:
        UserError: it cannot be had, or is not what it should be.
    """
    import pooch
    import requests

    pooch.get_logger().setLevel("WARNING")
    get = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), timeout=60)
    instead = "or use --from with a copy of yours"
    for name, urls in addresses.items():
        known, is_gz = recipe.files[name], name.endswith(".gz")
        for url in urls:
            try:
                print(f"downloading {url}", flush=True)
                path = Path(pooch.retrieve(url, None if is_gz else known, fname=name, path=folder, downloader=get))
                break
            except ValueError as error:  # another SHA-256, or no address
                raise UserError(f"{url}: {error}; choose another --url, {instead}") from error
            except (requests.RequestException, OSError) as error:
                print(f"WARNING: could not download {url} ({type(error).__name__})", file=sys.stderr)
        else:
            raise UserError(f"could not download {name}: run it again, {instead}")
        with readable(url):
            if is_gz and sha256(path, uncompressed=True) != known:
                raise UserError(f"{url} is not the text that this script knows: choose another --url, {instead}")
    return folder if len(addresses) > 1 else path


# ---------------------------------------------------------------------- take: files of a source, checked


def take(place: str, *wanted: str) -> None:
    """Copy files of a folder (plain or .gz), a tar or a zip, and check that each is text.

    Args:
        wanted: TARGET=NAME, or TARGET=NAME,OTHERNAME, in the working folder; no NAME is TARGET's own.

    Raises:
        UserError: the source is none, damaged, or lacks a file; or a file is no UTF-8 text.
    """
    source = Path(place)
    targets = {Path(target): [name or Path(target).name for name in names.split(",")]
               for target, _, names in (word.partition("=") for word in wanted)}
    with readable(source), opened(source) as members:
        found = {target: next(filter(members.__contains__, names), None) for target, names in targets.items()}
        missing = [targets[target][0] for target, name in found.items() if name is None]
        if missing:
            has = ", ".join(sorted(members)[:3]) or "nothing"
            raise UserError(f"{source} lacks {', '.join(missing)} (it has {has} …): put a good copy in its place")
        for target, name in found.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            with members[name]() as file, target.open("wb") as copy:
                shutil.copyfileobj(file, copy, 1 << 20)
            check_text(target, f"{source}: {name}")


@contextmanager
def readable(source: object) -> Iterator[None]:
    """Raise UserError where a file turns out to be damaged."""
    try:
        yield
    except (*UNREADABLE, OSError) as error:
        if getattr(error, "errno", None) is not None:  # unlike gzip's, of damaged data
            raise
        raise UserError(f"{source} is corrupt or cut short: put a good copy in its place") from error


@contextmanager
def opened(source: Path) -> Iterator[dict[str, Any]]:
    """The files of a source: name, without folders and .gz → a function that opens it."""
    if source.is_dir():
        files = (path for path in sorted(source.iterdir(), reverse=True) if path.is_file())
        yield {path.name.removesuffix(".gz"):  # plain before .gz
               lambda path=path: gzip.open(path) if path.suffix == ".gz" else path.open("rb") for path in files}
        return
    if zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as archive:
            yield {Path(info.filename).name: lambda info=info: archive.open(info)
                   for info in archive.infolist() if not info.is_dir()}
        return
    with tarfile.open(source) as archive:
        members = archive.getmembers()
        while archive.fileobj.read(1 << 20):  # to the end, where the checksum is
            pass
        # safe without tarfile's filters: no path of the archive is written to, and links and devices are no files
        yield {Path(info.name).name: lambda info=info: archive.extractfile(info)
               for info in members if info.isfile()}


def check_text(path: Path, name: str) -> None:
    """Raise UserError unless a file is UTF-8 text, and not empty."""
    empty = True
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            empty = empty and not line.strip()
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{name} is not UTF-8 (the first bad line is number {number})") from None
    if empty:
        raise UserError(f"{name} is empty")


# ---------------------------------------------------------------------- counts


def count_lines(path: Path) -> int:
    """Like fairseq, and unlike wc -l, with a last line that has no newline."""
    with path.open("rb") as file:
        return sum(1 for _ in file)


def pairs(*published: str) -> None:
    """Compare the lines of PREFIX.de and PREFIX.en with each other, and with the number of pairs in PREFIX=NUMBER.

    Raises:
        UserError: the languages differ, or there is no pair.
    """
    for prefix, expected in (word.split("=") for word in published):
        german, english = (count_lines(Path(f"{prefix}.{language}")) for language in ("de", "en"))
        split = Path(prefix).name
        if german != english or not german:
            raise UserError(f"{split}: {german} lines of German and {english} of English; they must be translations "
                            "line by line")
        compare(split, german, expected, "sentence pairs")


def tokens(data_bin: str, *published: str) -> None:
    """Compare fairseq-preprocess's counts, with line ends, with the published ones: SPLIT=NUMBER, types=NUMBER."""
    log = Path(data_bin, "preprocess.log").read_text(encoding="utf-8")
    for what, expected in (word.split("=") for word in published):
        unit = r"Dictionary: (\d+) types" if what == "types" else rf"text/{what}\.tokens: .* sents, (\d+) tokens"
        compare(what, int(re.search(unit, log)[1]), expected, "entries" if what == "types" else "tokens")


def compare(what: str, found: int, published: str, unit: str) -> None:
    print(f"{what}: {found:,} {unit}")
    if found != int(published):
        print(f"WARNING: {what}: {found} {unit}; the published corpus has {published}", file=sys.stderr)


# ---------------------------------------------------------------------- command line


def stop(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)  # through all `finally`


def main() -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    commands = {"run": run, "take": take, "pairs": pairs, "tokens": tokens}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    with errors_in_a_line():
        commands[sys.argv[1]](*sys.argv[2:])


if __name__ == "__main__":
    main()
