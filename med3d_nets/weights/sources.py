"""How the datasets that weights were trained on are recognised: by name and by the names of their cases.

Names and numbers of the Medical Segmentation Decathlon: Antonelli et al., "The Medical Segmentation Decathlon", Nature
Communications 2022; of LiTS: Bilic et al., "The Liver Tumor Segmentation Benchmark", Medical Image Analysis 2023.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """One dataset of a training. All patterns are regular expressions on lower-case text.

    Attributes:
        title: its name for people.
        entry: pattern of the entry in ``Weight.datasets`` that means it.
        case: pattern of its case names; the group is the case's number.
        last: highest number with public labels, None where that cannot be told from the number.
        unlabelled: pattern of further case names, of its part without public labels.
        task: its Decathlon task, 0: none.
        organ: pattern of the words that name it, beside "Decathlon", "MSD" or "TaskNN".
        names: pattern of further names of its own.
        usual: what its ``dataset.json`` is called, words that other data may use too.
        related: pattern of other datasets that hold some of its scans.
        own: made by this project, so that a case's name is proof enough.
    """

    title: str
    entry: str
    case: str
    last: int | None = None
    unlabelled: str = ""
    task: int = 0
    organ: str = ""
    names: str = ""
    usual: tuple[str, ...] = ()
    related: str = ""
    own: bool = False

    def is_meant(self, entry: str) -> bool:
        """Whether an entry of ``Weight.datasets`` is this dataset."""
        return bool(re.search(self.entry, entry.lower()))

    def is_named(self, text: str) -> bool:
        """Whether a text names this dataset and can hardly mean another."""
        words = _words(text)
        if self.names and re.search(self.names, words):
            return True
        number = rf"\b(?:task|dataset) ?0*{self.task}\b"  # nnU-Net calls it Dataset003_Liver
        if not self.task:
            return False
        if re.search(r"\bdecathlon\b(?! (layout|format|style|like)\b)|\bmsd\b", words) and re.search(
            rf"{number}|{self.organ}", words
        ):
            return True
        return bool(re.search(rf"{number} ?({self.organ})", words))

    def is_usual(self, text: str) -> bool:
        """Whether a text is what this dataset is usually called, and nothing else."""
        return _words(text) in self.usual

    def is_related(self, text: str) -> bool:
        """Whether a text names another dataset that holds some of the scans."""
        return bool(self.related and re.search(self.related, _words(text)))

    def has_case(self, case: str) -> bool:
        """Whether a case's name is of this dataset's labelled part."""
        number = self._number(case)
        return number is not None and (self.last is None or number <= self.last)

    def has_unlabelled_case(self, case: str) -> bool:
        """Whether a case's name is of this dataset's part without public labels."""
        number = self._number(case)
        return bool(re.fullmatch(self.unlabelled, case.lower())) or (number is not None and not self.has_case(case))

    def _number(self, case: str) -> int | None:
        match = re.fullmatch(rf"(?:{self.case})(?:_\d{{4}})?", case.lower())  # nnU-Net appends the channel
        return int(next(filter(None, match.groups()), 0)) if match else None


def is_decathlon_alone(texts: Iterable[str]) -> bool:
    """Whether texts name the Decathlon, and neither a task nor anything else that would tell which of it."""
    words = [_words(text) for text in texts]
    return any(map(_DECATHLON_ALONE.fullmatch, words)) and not any(re.search(r"\btask ?\d", one) for one in words)


def _words(text: str) -> str:
    """Lower case, with single spaces between the words: ``Task03_Liver`` is ``task03 liver``."""
    return " ".join(re.findall(r"[a-z0-9]+", text.lower()))


_DECATHLON_ALONE = re.compile(r"(?:the )?(?:medical segmentation decathlon|msd)(?: (?:challenge|data|dataset))*")
_ABDOMENCT = r"abdomenct 1k|\bflare ?(20)?2[12]\b"

SOURCES = (
    Source(
        "Decathlon Task01 brain tumour",
        entry=r"task01",
        case=r"brats_(\d{3})",
        last=484,
        task=1,
        organ=r"brain ?tumou?r|brats|glioma",
        usual=("brats", "brain tumour", "brain tumor", "braintumour"),
        related=r"\bbrats ?(20)?1[67]\b",
    ),
    Source(
        "Decathlon Task02 heart",
        entry=r"task02",
        case=r"la_(\d{3})",
        task=2,
        organ=r"heart|left atrium|atrial",
        usual=("left atrium", "heart"),
        # The paper counts 100 volumes; the Decathlon has 30, the Atrial Segmentation Challenge of 2018 has 100.
        related=r"atri(al|um) segmentation challenge|\blasc\b",
    ),
    Source(
        "Decathlon Task03 liver (LiTS)",
        entry=r"task03|\blits\b",
        case=r"liver_(\d{1,3})|(?:volume|segmentation)-(\d{1,3})",
        last=130,
        unlabelled=r"test-volume-\d+",
        task=3,
        organ=r"liver",
        names=r"\blits\b|\blits ?(20)?17\b|liver tumou?r segmentation (benchmark|challenge)",
        usual=("liver",),
        related=rf"3d ?ircadb|{_ABDOMENCT}",
    ),
    Source(
        "Decathlon Task04 hippocampus",
        entry=r"task04",
        case=r"hippocampus_(\d{3})",
        task=4,
        organ=r"hippocampus",
        usual=("hippocampus",),
    ),
    Source(
        "Decathlon Task05 prostate",
        entry=r"task05",
        case=r"prostate_(\d{2})",
        task=5,
        organ=r"prostate",
        usual=("prostate",),
    ),
    Source(
        "Decathlon Task07 pancreas",
        entry=r"task07",
        case=r"pancreas_(\d{3})",
        task=7,
        organ=r"pancreas",
        usual=("pancreas",),
        related=_ABDOMENCT,
    ),
    Source(
        "Decathlon Task08 hepatic vessel",
        entry=r"task08",
        case=r"hepaticvessel_(\d{3})",
        task=8,
        organ=r"hepatic ?vessel",
        usual=("hepatic vessel", "hepaticvessel"),
    ),
    Source(
        "Decathlon Task09 spleen",
        entry=r"task09",
        case=r"spleen_(\d{1,2})",
        task=9,
        organ=r"spleen",
        usual=("spleen",),
        related=_ABDOMENCT,
    ),
    # This project's own training data, by the case names of tools/lung_data.py.
    Source("elastix test data", entry=r"elastix", case=r"elastix_(?:baseline|followup)", own=True),
    Source(
        "TotalSegmentator test data",
        entry=r"totalsegmentator",
        case=r"totalseg_(?:abdomen|aorta|pulmonary)",
        related=r"totalsegmentator",
        own=True,
    ),
    Source("CT-FM example data", entry=r"ct-fm|ctfm", case=r"ctfm_\w+", related=r"\bct ?fm\b", own=True),
    Source(
        "chest CT from the Cancer Imaging Archive", entry=r"cancer imaging archive|tcia", case=r"chest_dicom", own=True
    ),
    Source("DeepReg test data", entry=r"deepreg", case=r"case(\d{6})", names=r"\bdeepreg\b"),
    Source(
        "LIDC-IDRI",
        entry=r"lidc",
        case=r"lidc-idri-(\d{4})(?:_r_\d+)?",
        names=r"\blidc\b|\blung image database consortium\b",
        related=r"\bluna ?16\b",
        own=True,
    ),
    Source("open_ms_data", entry=r"open_ms_data", case=r"patient(\d\d)|p(\d\d)", names=r"\bopen ms data\b"),
    Source(
        "spinalcordtoolbox test data",
        entry=r"spinalcordtoolbox",
        case=r"sct_(?:t1w|t2)",
        names=r"\bspinal ?cord ?toolbox\b|\bsct testing data\b",
    ),
    Source("synthetic CT of tools.liver_data", entry=r"tools\.liver_data", case=r"(?:made|chest)_(\d{4})", own=True),
    Source("synthetic CT of tools.phantom", entry=r"phantom|synthetic", case=r"phantom_(\d{3})", own=True),
)
