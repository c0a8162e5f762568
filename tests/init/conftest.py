"""A library's database and questions about it, in the forms in which users have them."""

from __future__ import annotations

import csv
import io
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

DDL = (
    "CREATE TABLE author (id INTEGER PRIMARY KEY, name TEXT NOT NULL, country TEXT)",
    "CREATE TABLE book (id INTEGER PRIMARY KEY, title TEXT NOT NULL, author_id INTEGER REFERENCES author(id), year INTEGER)",
)
DUMP = """\
--
-- PostgreSQL database dump
--
SET statement_timeout = 0;
SELECT pg_catalog.set_config('search_path', '', false);
CREATE TABLE public.author (
    id integer NOT NULL,
    name character varying(80) NOT NULL
);
ALTER TABLE public.author OWNER TO postgres;
CREATE SEQUENCE public.author_id_seq AS integer START WITH 1 INCREMENT BY 1 NO MINVALUE NO MAXVALUE CACHE 1;
CREATE TABLE public.book (
    id integer NOT NULL,
    author_id integer NOT NULL,
    title text NOT NULL,
    published timestamp with time zone DEFAULT now(),
    tags text[]
);
ALTER TABLE ONLY public.author ADD CONSTRAINT author_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.book ADD CONSTRAINT book_author_fkey FOREIGN KEY (author_id) REFERENCES public.author(id);
CREATE INDEX book_author_idx ON public.book USING btree (author_id);
"""
Pair = tuple[str, str]


def questions(count: int) -> list[Pair]:
    """Each with another question and another SQL, whose result has rows."""
    return [
        (f"Which books are newer than {1900 + number}?", f"SELECT title FROM book WHERE year > {1900 + number}")
        for number in range(count)
    ]


def postgres_questions(count: int) -> list[Pair]:
    return [
        (
            f"Titles published after {1700 + n}?",
            f"SELECT title FROM public.book WHERE published > '{1700 + n}-01-01'::timestamptz",
        )
        for n in range(count)
    ]


def as_csv(rows: list[Pair], header: Pair = ("question", "sql"), delimiter: str = ",") -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter, lineterminator="\n")
    writer.writerows([header, *rows])
    return stream.getvalue()


def make_library(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in DDL:
        connection.execute(statement)
    connection.executemany("INSERT INTO author VALUES (?, ?, ?)", [(n, f"author {n}", "PL") for n in range(1, 4)])
    books = [(n, f"book {n}", 1 + n % 3, 1900 + n) for n in range(1, 400)]
    connection.executemany("INSERT INTO book VALUES (?, ?, ?, ?)", books)
    connection.commit()
    connection.close()
    return path


@pytest.fixture
def library(tmp_path: Path) -> Path:
    return make_library(tmp_path / "library.sqlite")


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a file in the test's folder."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write
