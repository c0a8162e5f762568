"""A schema file as the statements that prompts show: what dumps hold besides SQL hides none of them."""

import pytest

from finetune.sql.schema import compact, parse_ddl
from finetune.sql.schema_text import readable_schema, types_not_shown
from tests.helpers.errors import raises

SERVER = """USE [shop]
GO
SET ANSI_NULLS ON
GO
CREATE TYPE [dbo].[Phone] FROM nvarchar(50) NOT NULL
GO
CREATE TABLE [dbo].[users]([id] [int] NOT NULL, [phone] [dbo].[Phone] NULL) ON [PRIMARY]
GO
INSERT [dbo].[users] VALUES (1, N'O''Brien')
GO
CREATE TABLE [dbo].[orders]([id] [int] NOT NULL, [user] [int] NULL)
GO
ALTER TABLE [dbo].[orders] WITH CHECK ADD FOREIGN KEY([user]) REFERENCES [dbo].[users] ([id])
GO
"""
SERVER_SHOWN = """\
CREATE TABLE [dbo].[users]([id] [int] NOT NULL, [phone] [dbo].[Phone] NULL) ON [PRIMARY];
CREATE TABLE [dbo].[orders]([id] [int] NOT NULL, [user] [int] NULL);
ALTER TABLE [dbo].[orders] WITH CHECK ADD FOREIGN KEY([user]) REFERENCES [dbo].[users] ([id]);"""

ORACLE = """REM users
CREATE OR REPLACE TYPE address AS OBJECT (city VARCHAR2(20));
/
CREATE TABLE users (id NUMBER(10), home address)
/
CREATE TABLE orders (id NUMBER(10), item VARCHAR2(20))
/
"""
ORACLE_SHOWN = """\
CREATE TABLE users (id NUMBER(10), home address);
CREATE TABLE orders (id NUMBER(10), item VARCHAR2(20));"""

WITH_ROWS = """CREATE TABLE note (id integer, text text);
COPY note (id, text) FROM stdin;
1\tit's; "odd
2\tCREATE TYPE x AS RANGE (
\\.
ALTER TABLE ONLY note ADD PRIMARY KEY (id);
"""
WITH_ROWS_SHOWN = """\
CREATE TABLE note (id integer, text text);
ALTER TABLE ONLY note ADD PRIMARY KEY (id);"""


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("script", "dialect", "shown"),
    [(SERVER, "tsql", SERVER_SHOWN), (ORACLE, "oracle", ORACLE_SHOWN), (WITH_ROWS, "postgres", WITH_ROWS_SHOWN)],
)
def test_what_a_client_cuts_off_or_into_batches(script: str, dialect: str, shown: str, line_end: str) -> None:
    assert readable_schema(script.replace("\n", line_end), dialect) == (shown, dialect)


def test_types_in_batches_and_in_rows() -> None:
    assert types_not_shown(SERVER, "tsql") == ["[dbo].[Phone]"]
    assert types_not_shown(ORACLE, "oracle") == ["address"]
    assert types_not_shown(WITH_ROWS, "postgres") == []


def test_the_views_of_a_mysql_dump_are_shown_with_their_query() -> None:
    dump = """CREATE TABLE `users` (`id` int, `name` text) ENGINE=InnoDB;
CREATE VIEW `plain` AS SELECT `id` FROM `users`;
/*!50001 CREATE VIEW `v` AS SELECT 1 AS `id`, 1 AS `n`*/;
/*!50001 DROP VIEW IF EXISTS `v`*/;
/*!50001 CREATE ALGORITHM=UNDEFINED */
/*!50013 DEFINER=`root`@`localhost` SQL SECURITY DEFINER */
/*!50001 VIEW `v` AS select `users`.`id` AS `id`, `users`.`name` AS `n` from `users` */;
"""
    shown, _ = readable_schema(dump, "mysql")
    assert shown.splitlines() == [
        "CREATE TABLE `users` (`id` int, `name` text) ENGINE=InnoDB;",
        "CREATE VIEW `plain` AS SELECT `id` FROM `users`;",
        "CREATE VIEW `v` AS select `users`.`id` AS `id`, `users`.`name` AS `n` from `users`;",
    ]
    assert compact(parse_ddl(shown, "mysql")) == "users(id, name)\nplain(id)\nv(id, n)"


def test_a_table_that_a_procedure_makes_is_not_shown() -> None:
    procedure = "CREATE PROCEDURE p AS\nBEGIN\nCREATE TABLE #x (a int);\nSELECT 1;\nEND\nGO\n"
    shown, _ = readable_schema(f"CREATE TABLE t (id int)\nGO\n{procedure}", "tsql")
    assert shown == "CREATE TABLE t (id int);"


def test_a_schema_is_never_empty() -> None:
    procedure = "IF OBJECT_ID('t') IS NULL\nBEGIN\nCREATE TABLE t (id int)\nEND\nGO\n"
    with raises("sql.bad_schema", match="cannot be told apart"):
        readable_schema(procedure, "tsql")
