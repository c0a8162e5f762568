"""Enums and domains of a dump: what prompts show of them in both formats, and that nothing else changes."""

import pytest

from finetune.data.prompts import PromptTemplate
from finetune.sql.schema import compact, parse_ddl
from finetune.sql.schema_text import readable_schema, types_not_shown

DUMP = """
CREATE TYPE public.state AS ENUM (
    'open',
    'it''s closed'
);
ALTER TYPE public.state OWNER TO postgres;
CREATE DOMAIN public.mail AS character varying(20)
    CONSTRAINT mail_check CHECK (((VALUE)::text ~~ '%@%'::text));
CREATE TYPE public.span AS RANGE (subtype = float8);
CREATE TYPE address AS (street text, city text);
CREATE TABLE public.visit (
    id integer NOT NULL,
    state public.state DEFAULT 'open'::public.state NOT NULL,
    contact public.mail
);
CREATE VIEW public.v AS SELECT visit.id FROM public.visit;
"""
SHOWN = """
CREATE TYPE public.state AS ENUM ('open', 'it''s closed');
CREATE DOMAIN public.mail AS character varying(20) CONSTRAINT mail_check CHECK (((VALUE)::text ~~ '%@%'::text));
CREATE TYPE address AS (street text, city text);
CREATE TABLE public.visit (id integer NOT NULL, state public.state DEFAULT 'open'::public.state NOT NULL, contact public.mail);
CREATE VIEW public.v AS SELECT visit.id FROM public.visit;
"""


def test_enums_composite_types_and_domains_stay_in_the_order_of_the_dump() -> None:
    assert readable_schema(DUMP, "postgres") == (SHOWN.strip(), "postgres")


def test_the_other_types_are_named() -> None:
    assert types_not_shown(DUMP, "postgres") == ["public.span"]
    assert types_not_shown("CREATE TYPE a AS ENUM ('x'); CREATE TABLE t (a a)", "sqlite") == ["a"]
    assert types_not_shown("CREATE TYPE dbo.tt AS TABLE (a int); CREATE TABLE t (a int)", "tsql") == ["dbo.tt"]


def test_both_formats_show_the_values() -> None:
    schema, _ = readable_schema(DUMP, "postgres")
    prompts = [
        PromptTemplate(schema_format=kind).render(schema=schema, question="?", dialect="postgres")
        for kind in ("ddl", "compact")
    ]
    assert SHOWN in prompts[0]
    assert "\npublic.visit(id, state in ('open', 'it''s closed'), contact)\npublic.v(id)\n" in prompts[1]


COMPACT = [
    ("CREATE TABLE t (m mood, n mood[], o text)", "t(m in ('a', 'b'), n[] in ('a', 'b'), o)"),
    ("CREATE TABLE t (m mood STORAGE PLAIN)", "t(m in ('a', 'b'))"),  # read without its option
    ("CREATE TABLE t (m public.mood); ALTER TYPE mood OWNER TO x", "t(m in ('a', 'b'))"),
    ("CREATE TABLE u (m mood); CREATE TABLE t (LIKE u)", "u(m in ('a', 'b'))|t(m in ('a', 'b'))"),
    ("CREATE DOMAIN d AS mood; CREATE DOMAIN e d; CREATE TABLE t (m e)", "t(m in ('a', 'b'))"),
    ("CREATE DOMAIN d AS d; CREATE TABLE t (m d)", "t(m)"),
    ("CREATE TABLE t (m mood); ALTER TYPE mood ADD VALUE IF NOT EXISTS 'c'", "t(m in ('a', 'b', 'c'))"),
    ("CREATE TABLE t (m mood); ALTER TYPE mood ADD VALUE 'c' BEFORE 'b'", "t(m in ('a', 'c', 'b'))"),
    ("CREATE TABLE t (m mood); ALTER TYPE mood RENAME VALUE 'a' TO 'c'", "t(m in ('c', 'b'))"),
    ("CREATE TABLE t (m mood); ALTER TYPE mood ADD VALUE 'after' BEFORE 'b'", "t(m in ('a', 'after', 'b'))"),
    ("CREATE TYPE word AS ENUM ('select'); CREATE TABLE t (m word)", "t(m in ('select'))"),
    ("ALTER TYPE other ADD VALUE 'c'; CREATE TABLE t (m text)", "t(m)"),
]


@pytest.mark.parametrize(("ddl", "shown"), COMPACT)
def test_the_compact_form_shows_the_values_of_a_column(ddl: str, shown: str) -> None:
    tables = parse_ddl(f"CREATE TYPE mood AS ENUM ('a', 'b'); {ddl}", "postgres")
    assert compact(tables) == shown.replace("|", "\n")


def test_the_values_of_an_enum_that_a_query_makes_are_not_known() -> None:
    ddl = "CREATE TYPE mood AS ENUM (SELECT m FROM x WHERE y = 'z'); CREATE TABLE t (m mood)"
    assert compact(parse_ddl(ddl, "duckdb")) == "t(m)"


def test_a_schema_without_types_is_shown_as_before() -> None:
    schema = "CREATE TABLE t (id int, state mood, tags mood[]);\nALTER TABLE t ADD COLUMN x text;"
    assert readable_schema(schema, "postgres") == (schema, "postgres")
    assert compact(parse_ddl(schema, "postgres")) == "t(id, state, tags, x)"


@pytest.mark.parametrize("dialect", ["sqlite", "postgres"])
def test_views_are_told_from_tables(dialect: str) -> None:
    ddl = "CREATE TABLE t (a int); CREATE VIEW v AS SELECT a FROM t; CREATE TABLE u AS SELECT a FROM t"
    assert [(table.name, table.is_view) for table in parse_ddl(ddl, dialect)] == [
        ("t", False),
        ("v", True),
        ("u", False),
    ]
