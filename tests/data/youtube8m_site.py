"""A server of YouTube-8M on this machine, with four small files for each level."""

import hashlib
import json
from contextlib import contextmanager

from web_site import Site

NAMES = [f"train{letters}.tfrecord" for letters in ("aa", "aB", "Zz", "09")]
VOCABULARY = "Index,TrainVideoCount,KnowledgeGraphId,Name,WikiUrl,Vertical1,WikiDescription\n"
VOCABULARY += "".join(f"{n},1,/m/{n},class {n},,,text\n" for n in range(3862))


def content(name, size=400_000):
    return hashlib.shake_128(name.encode()).digest(size)


@contextmanager
def youtube8m_site():
    """Serve partitions of four files each, with their plans and vocabularies."""
    site = Site()
    plan = {"files": {name: hashlib.md5(content(name)).hexdigest() for name in NAMES}}
    for level, version in (("frame", 2), ("frame", 3), ("video", 2), ("video_level", 1)):
        site.files[f"/{version}/download_plans/{level}_train.json"] = json.dumps(plan).encode()
        for name in NAMES:
            site.files[f"/{version}/{level}/train/{name}"] = content(name)
        site.files[f"/{version}/vocabulary.csv"] = VOCABULARY.encode()
    site.files["/1/vocabulary.csv"] = (
        VOCABULARY + "".join(f"{n},1,/m/{n},class {n},,,text\n" for n in range(3862, 4716))
    ).encode()
    try:
        yield site
    finally:
        site.close()
