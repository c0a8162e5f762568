"""A script of DDL as statements, by the rules of its dialect, and what each statement does to the schema.

Handles what dumps hold besides SQL: GO, / and REM lines, psql's commands and COPY data, MySQL's conditional comments and
DELIMITER.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from sqlglot.dialects import TSQL, MySQL, Oracle, Postgres
from sqlglot.dialects.dialect import Dialect
from sqlglot.errors import ParseError, SqlglotError
from sqlglot.tokens import Token, TokenType

from finetune.sql.quoting import word_set

Role = Literal["create", "type", "virtual", "alter", "drop", "irrelevant", "hidden", "unknown"]
"""create: a table or view. type: a type or domain, or a change of one. virtual: SQLite's virtual table. irrelevant: no table or
key comes from it. hidden: it creates a table or view inside a block or a string. unknown: none of these."""

_OTHER_OBJECTS = word_set(
    """
    ACCESS AGGREGATE ASSEMBLY ASSIGNMENT BITMAP CAPACITY CAST CATALOG CERTIFICATE COLLATION CONNECTION CONVERSION DATA
    DATABASE DEFAULT DIRECTORY DOMAIN EVENT EXTENSION FILE FULLTEXT FUNCTION INDEX INTEGRATION LANGUAGE LOGIN MACRO MASKING
    MODEL NETWORK OPERATOR PACKAGE PARTITION PIPE POLICY PROC PROCEDURE PUBLICATION RESERVATION RESOURCE ROLE ROW RULE SCHEMA
    SEARCH SECRET SEQUENCE SERVER SHARE SPATIAL STAGE STATISTICS STORAGE STREAM SUBSCRIPTION SYNONYM TABLESPACE TAG TASK TEXT
    TRANSFORM TRIGGER TYPE USER VECTOR WAREHOUSE XML
"""
)
"""What CREATE makes besides tables and views."""
_ROUTINES = word_set("FUNCTION PROC PROCEDURE TRIGGER PACKAGE EVENT")
_IRRELEVANT = word_set(
    """
    ANALYZE ATTACH BEGIN CALL CHECKPOINT CLUSTER COMMENT COMMIT COPY DEALLOCATE DECLARE DELETE DENY DESCRIBE DETACH DISABLE
    DISCARD DO ENABLE END EXEC EXECUTE EXPLAIN FLUSH FREEZE GO GRANT IF INSERT LISTEN LOAD LOCK MERGE MSCK NOTIFY OPTIMIZE
    PRAGMA PREPARE PRINT PROMPT PUT RAISERROR REFRESH REINDEX RELEASE REM REPAIR REPLACE RESET REVOKE ROLLBACK SAVE SAVEPOINT
    SECURITY SELECT SET SHOW START TRUNCATE UNLOAD UNLOCK UPDATE UPSERT USE VACUUM VALUES WITH
"""
)
"""First words of statements that hold rows, settings, rights or comments."""
_BLOCKS = word_set("BEGIN DECLARE DO EXEC EXECUTE IF")
"""Those of them that may run other statements."""
_NAMING = word_set("COMMENT DENY DESCRIBE EXPLAIN GRANT REVOKE SHOW")
"""Those in which CREATE TABLE is the name of a right or a question."""
_RELATIONS = word_set("TABLE VIEW")
_BATCH_STARTS = word_set("CREATE INSERT EXEC EXECUTE USE PRINT DECLARE GRANT IF") | {
    "ALTER TABLE",
    "DROP TABLE",
    "DROP VIEW",
}
"""How a T-SQL statement may begin on a new line, since semicolons are optional there."""
_CREATES = re.compile(r"\bCREATE(?:\s+OR\s+(?:REPLACE|ALTER))?(?:\s+\w+)?\s+(?:TABLE|VIEW)\b", re.IGNORECASE)

_QUOTED = re.compile(r"""'[^']*'|"[^"]*"|`[^`]*`|\$(\w*)\$.*?\$\1\$|--[^\n]*|/\*.*?\*/""", re.DOTALL)


@dataclass(frozen=True)
class Statement:
    """One statement. words: its words in capitals, in order, with "" for every quoted name, text and sign."""

    text: str
    words: tuple[str, ...]

    @property
    def created(self) -> tuple[str, ...]:
        """The words from CREATE to the kind of object it makes, such as CREATE, TEMP, TABLE; () if it makes none."""
        if self.words[:1] != ("CREATE",):
            return ()
        for number, (word, following) in enumerate(pairwise((*self.words, ""))):
            is_modifier = following in _RELATIONS  # HANA: CREATE ROW TABLE
            if word in _RELATIONS or (word in _OTHER_OBJECTS and not is_modifier):
                return self.words[: number + 1]
        return ()

    @property
    def inner(self) -> list[str]:
        """The texts that begin at each CREATE TABLE or CREATE VIEW in a block."""
        starts = [match.start() for match in _CREATES.finditer(self.text)]
        return [self.text[start:end] for start, end in zip(starts, [*starts[1:], len(self.text)], strict=True)]

    @property
    def role(self) -> Role:
        first = self.words[0] if self.words else ""
        if self.words[:2] in (("CREATE", "TYPE"), ("CREATE", "DOMAIN"), ("ALTER", "TYPE")):
            return "type"
        if first == "CREATE":
            return self._role_of_create()
        if first in ("ALTER", "DROP"):
            relation = _RELATIONS & set(self.words[1:3])
            return ("alter" if first == "ALTER" else "drop") if relation else "irrelevant"
        if _CREATES.search(self.text if first in _BLOCKS else _QUOTED.sub("", self.text)) and first not in _NAMING:
            return "hidden"
        if first in ("SELECT", "WITH") and "INTO" in self.words:  # SELECT ... INTO makes a table
            return "create"
        return "irrelevant" if first in _IRRELEVANT else "unknown"

    def _role_of_create(self) -> Role:
        created = self.created
        if not created:
            return "unknown"
        after = self.words[len(created) : len(created) + 1]
        if created[-1] in _OTHER_OBJECTS or (created[-1], *after) in (("TABLE", "FUNCTION"), ("VIEW", "LOG")):
            return "irrelevant"
        return "virtual" if "VIRTUAL" in created else "create"


def split_script(ddl: str, dialect: Dialect) -> list[Statement]:
    """The statements of a script without the empty ones. Raises ParseError where the text ends inside a quote."""
    found: list[Statement] = []
    for batch in _batches(ddl, dialect):
        for tokens in _split(batch, dialect):
            text = batch[tokens[0].start : tokens[-1].end + 1]
            found.append(Statement(text, tuple(word for token in tokens for word in _words(token, batch))))
    return found


def tokens_of(text: str, dialect: Dialect) -> list[Token]:
    """Raises ParseError where the text ends inside a quote."""
    try:
        return list(dialect.tokenize(text))
    except SqlglotError:
        raise ParseError("a quote or comment in it is not closed") from None


def _words(token: Token, text: str) -> list[str]:
    """A token may be several words, such as PRIMARY KEY."""
    words = text[token.start : token.end + 1].upper()
    return words.split() if re.fullmatch(r"\w[\w\s]*", words) else [""]


def _word(token: Token, text: str) -> str:
    return _words(token, text)[0]


# Dumps hold more than SQL -----------------------------------------------------------------------------------

_GO = r"^[ \t]*GO(?:[ \t]+\d+)?[ \t]*;?[ \t]*\r?$"
_SLASH = r"^[ \t]*/[ \t]*\r?$|^(?:REM|REMARK|PROMPT|SPOOL|WHENEVER|SET[ ]+(?:DEFINE|SCAN|ECHO|FEEDBACK))\b.*$"
_PSQL = r"^COPY\b[^;]*\bFROM[ ]+stdin\b[^;]*;\r?\n(?:.*\n)*?\\\.\r?$|^\\.*$"
_DELIMITER = r"^DELIMITER[ \t]+(?!;)\S+(?:.*\n)*?^DELIMITER[ \t]+;[ \t]*\r?$|^DELIMITER\b.*$"
_CONDITIONAL = r"/\*M?!\d*(?P<run>(?:[^*]|\*(?!/))*)\*/"


def _batches(ddl: str, dialect: Dialect) -> list[str]:
    """The text without what is not SQL, cut where a client cuts it. Quoted text and comments stay as they are."""
    special = (
        _GO
        if isinstance(dialect, TSQL)
        else _SLASH
        if isinstance(dialect, Oracle)
        else f"{_DELIMITER}|{_CONDITIONAL}"
        if isinstance(dialect, MySQL)
        else _PSQL
        if isinstance(dialect, Postgres)
        else None
    )
    if special is None:
        return [ddl]
    escape = r"\\." if "\\" in dialect.tokenizer_class.STRING_ESCAPES else r"(?!)"
    kept = (
        rf"""'(?:{escape}|''|[^'])*'|"(?:""|[^"])*"|`[^`]*`|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|--[^\n]*|/\*(?!M?!).*?\*/"""
    )
    flags = re.IGNORECASE | re.MULTILINE | re.DOTALL
    pieces, current, position = [], "", 0
    for match in re.finditer(f"(?P<special>{_not_dotall(special)})|{kept}", ddl, flags):
        if match["special"] is None:
            continue
        current += ddl[position : match.start()]
        position = match.end()
        run = match.groupdict().get("run")
        if run is not None:
            current += f" {run} "
        elif isinstance(dialect, TSQL | Oracle):
            pieces.append(current)
            current = ""
    return [*pieces, current + ddl[position:]]


def _not_dotall(pattern: str) -> str:
    return f"(?-s:{pattern})"


# Statements -------------------------------------------------------------------------------------------------


def _split(text: str, dialect: Dialect) -> Iterator[list[Token]]:
    """The tokens of each statement, without the semicolon. The body of a routine is not divided."""
    current: list[Token] = []
    parentheses = blocks = 0
    tokens = tokens_of(text, dialect)
    for number, token in enumerate(tokens):
        word = _word(token, text)
        following = _word(tokens[number + 1], text) if number + 1 < len(tokens) else ""
        if (
            current
            and not parentheses
            and not blocks
            and _starts_another(current, text, token, (word, following), dialect)
        ):
            yield current
            current = []
        routine = _is_routine(current, text)
        if token.token_type == TokenType.SEMICOLON and not blocks and not parentheses:
            if current:
                yield current
            current = []
            continue
        parentheses += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(token.token_type, 0)
        if routine and word in ("BEGIN", "CASE"):
            blocks += 1
        if routine and word == "END" and following not in ("IF", "LOOP", "WHILE", "REPEAT", "FOR"):
            blocks = max(0, blocks - 1)
        current.append(token)
    if current:
        yield current


def _is_routine(tokens: Sequence[Token], text: str) -> bool:
    """Whether the statement defines a function, procedure or trigger, whose body may hold semicolons."""
    words = [_word(token, text) for token in tokens[:12]]
    return (
        words[:1] == ["CREATE"]
        and bool(_ROUTINES.intersection(words))
        and not {"TABLE", "VIEW"}.intersection(
            words[: next((n for n, word in enumerate(words) if word in _ROUTINES), 0)]
        )
    )


def _starts_another(
    current: Sequence[Token], text: str, token: Token, words: tuple[str, str], dialect: Dialect
) -> bool:
    """Whether a statement begins here although no semicolon ended the one before it.

    In every dialect, CREATE after the columns of a table and within CREATE SCHEMA does; in T-SQL also other first words at
    the start of a line.
    """
    if words[0] == "CREATE" and _word(current[0], text) == "CREATE":
        ends = current[-1].token_type == TokenType.R_PAREN or [_word(token, text) for token in current[1:2]] == [
            "SCHEMA"
        ]
        if ends and not _is_routine(current, text):
            return True
    if not isinstance(dialect, TSQL) or _is_routine(current, text) or _word(current[0], text) in _BLOCKS:
        return False
    at_line_start = "\n" in text[current[-1].end + 1 : token.start]
    return at_line_start and bool(_BATCH_STARTS & {words[0], " ".join(words)})


def virtual_table(text: str, dialect: Dialect) -> tuple[str, list[str]]:
    """Name and columns of SQLite's CREATE VIRTUAL TABLE, whose arguments are columns and, with =, options."""
    tokens = tokens_of(text, dialect)
    words = [_word(token, text) for token in tokens]
    try:
        using = words.index("USING")
    except ValueError:
        raise ParseError("it does not say which module it uses") from None
    arguments: list[list[Token]] = [[]]
    depth = 0
    for token in tokens[using + 2 :]:
        depth += {TokenType.L_PAREN: 1, TokenType.R_PAREN: -1}.get(token.token_type, 0)
        if token.token_type == TokenType.COMMA and depth == 1:
            arguments.append([])
        else:
            arguments[-1].append(token)
    arguments[0] = arguments[0][1:]
    columns = [
        part[0].text for part in arguments if part and not any(token.token_type == TokenType.EQ for token in part)
    ]
    if not columns:
        raise ParseError("its columns cannot be read")
    return tokens[using - 1].text, [column for column in columns if column != ")"]
