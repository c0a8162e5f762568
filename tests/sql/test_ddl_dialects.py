"""DDL of every dialect: each statement is shown, is known to be irrelevant, or is an error that quotes it."""

import pytest

from finetune.sql.schema import compact, parse_ddl
from tests.helpers.errors import raises

FIRST = "CREATE TABLE client (id INT, name VARCHAR(9));\n"
"""Comes before each of the statements."""

SHOWN = {
    "postgres": [
        ("CREATE TEMP TABLE o (a int)", "o(a)"),
        ("CREATE UNLOGGED TABLE IF NOT EXISTS o (a bigint GENERATED ALWAYS AS IDENTITY)", "o(a)"),
        ("CREATE TABLE o (a int, b int GENERATED ALWAYS AS (a + 1) STORED)", "o(a, b)"),
        ("CREATE TABLE o (c int REFERENCES client (id))", "o(c -> client.id)"),
        ("CREATE TABLE o (x int) INHERITS (client)", "o(id, name, x)"),
        ("CREATE TABLE o (LIKE client INCLUDING ALL, x int)", "o(id, name, x)"),
        ("CREATE TABLE o PARTITION OF client FOR VALUES FROM (1) TO (9)", "o(id, name)"),
        ("CREATE TABLE o PARTITION OF client (CONSTRAINT c CHECK (id > 0)) DEFAULT", "o(id, name)"),
        ("CREATE TABLE o (d date) PARTITION BY RANGE (d)", "o(d)"),
        ("CREATE TABLE o AS SELECT *, id + 1 AS n FROM client WITH NO DATA", "o(id, name, n)"),
        ("CREATE TABLE o (a, b) AS SELECT 1, 2", "o(a, b)"),
        ("CREATE TABLE o AS TABLE client", "o(id, name)"),
        ("SELECT id, name AS n INTO o FROM client", "o(id, n)"),
        (
            "CREATE OR REPLACE VIEW o AS SELECT c.*, d.id AS other FROM client c JOIN client d USING (id)",
            "o(id, name, other)",
        ),
        ("CREATE VIEW o AS WITH w AS (SELECT id FROM client) SELECT * FROM w UNION SELECT 1", "o(id)"),
        ("CREATE VIEW o AS SELECT name, count(*), max(id) FROM client GROUP BY name", "o(name, count, max)"),
        ("CREATE VIEW o AS VALUES (1, 2)", "o(column1, column2)"),
        ("CREATE VIEW o WITH (security_barrier = true) AS SELECT id FROM client", "o(id)"),
        ("CREATE MATERIALIZED VIEW public.o TABLESPACE x AS SELECT id FROM client WITH NO DATA", "public.o(id)"),
        ("CREATE FOREIGN TABLE o (a int) SERVER s OPTIONS (x 'y')", "o(a)"),
        ('CREATE TABLE "Order.Items" ("Id" int, "a.b" text[], "plain" int)', '"Order.Items"("Id", "a.b", plain)'),
        (
            "CREATE TABLE o (key text, index int, value int, type text, comment text)",
            "o(key, index, value, type, comment)",
        ),
        ("CREATE TABLE o (a int STORAGE PLAIN, b bit varying(5), c public.citext)", "o(a, b, c)"),
        ("CREATE TABLE o (a text DEFAULT 'C:\\', b int); -- it's", "o(a, b)"),
        ("CREATE TABLE o ()", "o()"),
        ("CREATE SCHEMA s CREATE TABLE o (a int)", "o(a)"),
        ("CREATE TABLE o (a int)\n\nCREATE TABLE p (b int)", "o(a)|p(b)"),
    ],
    "mysql": [
        (
            "CREATE TABLE `o` (`id` int(11) unsigned NOT NULL AUTO_INCREMENT COMMENT 'it\\'s; an id', `e` enum('a','b') "
            "CHARACTER SET utf8mb4 DEFAULT NULL, `c` int, PRIMARY KEY (`id`) USING BTREE, UNIQUE KEY `u` (`e`), "
            "KEY `k` (`e`(10)), FULLTEXT KEY `f` (`e`), CONSTRAINT `x` FOREIGN KEY (`c`) REFERENCES `client` (`id`)) "
            "ENGINE=InnoDB AUTO_INCREMENT=3 DEFAULT CHARSET=utf8mb4 COMMENT='x'",
            "o(id, e, c -> client.id)",
        ),
        ("CREATE TABLE `order details` (`a.b` int, `group` int, c point)", "`order details`(`a.b`, `group`, c)"),
        ("CREATE TABLE o LIKE client", "o(id, name)"),
        ("CREATE TABLE o (a int) SELECT id FROM client", "o(a, id)"),
        ("CREATE TABLE o (a int) /*!50100 PARTITION BY HASH (a) */", "o(a)"),
        ("CREATE TABLE o (a int /*!80016 INVISIBLE */, g geometry NOT NULL SRID 4326)", "o(a, g)"),
        (
            "/*!50001 CREATE ALGORITHM=UNDEFINED */\n/*!50013 DEFINER=`r`@`h` SQL SECURITY DEFINER */\n"
            "/*!50001 VIEW `o` AS select `client`.`id` AS `i` from `client` */",
            "o(i)",
        ),
    ],
    "tsql": [
        (
            "CREATE TABLE [o]([a] [dbo].[Name] NOT NULL, [x] [xml](CONTENT [p].[AScheme]) NULL, y xml (p.q), "
            "[n] AS (isnull('AW'+[dbo].[f]([a]),'')))",
            "o(a, x, y, n)",
        ),
        (
            "CREATE TABLE [dbo].[Orders]([Id] [int] IDENTITY(1,1) NOT NULL, [Name] [nvarchar](max) COLLATE Latin1_General_CI_AS "
            "NULL, [Total] AS ([Id]*2) PERSISTED, CONSTRAINT [PK] PRIMARY KEY CLUSTERED ([Id] ASC) WITH (PAD_INDEX = OFF) "
            "ON [PRIMARY]) ON [PRIMARY] TEXTIMAGE_ON [PRIMARY]\nGO\n",
            "dbo.Orders(Id, Name, Total)",
        ),
        ("SET ANSI_NULLS ON\nGO\nCREATE TABLE o (a int)\nGO\nCREATE TABLE p (b int)\nGO", "o(a)|p(b)"),
        ("EXEC sp_x @a = 1\nGO\nCREATE TABLE o (a int)", "o(a)"),
        ("CREATE TABLE o (a varchar(9) DEFAULT 'x\nGO\ny')", "o(a)"),
        ("CREATE TABLE o (a int)\nCREATE TABLE p (b int)\nINSERT INTO p VALUES (1)", "o(a)|p(b)"),
        ("CREATE TABLE dbo.[Order Details] ([Order ID] int, [a.b] int)", "dbo.[Order Details]([Order ID], [a.b])"),
        ("CREATE TABLE #o (a int, INDEX ix (a), UNIQUE NONCLUSTERED (a ASC))", "#o(a)"),
        (
            "CREATE TABLE o (a uniqueidentifier ROWGUIDCOL DEFAULT (newid()), b int FOREIGN KEY REFERENCES client(id) NOT FOR "
            "REPLICATION, s datetime2 GENERATED ALWAYS AS ROW START HIDDEN NOT NULL, PERIOD FOR SYSTEM_TIME (s, e), "
            "e datetime2 GENERATED ALWAYS AS ROW END NOT NULL) WITH (SYSTEM_VERSIONING = ON)",
            "o(a, b -> client.id, s, e)",
        ),
        ("IF NOT EXISTS (SELECT * FROM sys.objects)\nBEGIN\nCREATE TABLE o (a int)\nEND", "o(a)"),
        ("CREATE OR ALTER VIEW o WITH SCHEMABINDING AS SELECT id FROM dbo.client WITH CHECK OPTION", "o(id)"),
        ("SELECT id INTO o FROM client", "o(id)"),
        ("CREATE EXTERNAL TABLE o (a int) WITH (LOCATION = 'x')", "o(a)"),
    ],
    "bigquery": [
        (
            "CREATE TABLE `proj.ds.orders` (id INT64 NOT NULL OPTIONS(description='a, b'), c STRUCT<name STRING, at STRUCT<city "
            "STRING>>, items ARRAY<STRUCT<sku STRING, sizes ARRAY<STRUCT<n INT64>>>>, tags ARRAY<STRING>) PARTITION BY DATE(ts)",
            "proj.ds.orders(id, c.name, c.at.city, items[].sku, items[].sizes[].n, tags)",
        ),
        ("CREATE TABLE my-proj.ds.o (a INT64)", "my-proj.ds.o(a)"),
        ("CREATE TABLE `my-proj`.ds.o (a INT64)", "`my-proj`.ds.o(a)"),
        ("CREATE OR REPLACE EXTERNAL TABLE ds.o (a INT64) OPTIONS(format='CSV')", "ds.o(a)"),
        ("CREATE SNAPSHOT TABLE ds.o CLONE client", "ds.o(id, name)"),
        ("CREATE TABLE ds.o COPY client", "ds.o(id, name)"),
        ("CREATE VIEW ds.o (a OPTIONS(description='x')) AS SELECT 1", "ds.o(a)"),
    ],
    "snowflake": [
        ("CREATE OR REPLACE TABLE orders (id int, c int)", "orders(id, c)"),
        (
            "CREATE OR REPLACE TRANSIENT TABLE db.s.o (id int AUTOINCREMENT START 1, v VARIANT) CLUSTER BY (id)",
            "db.s.o(id, v)",
        ),
        ("CREATE TABLE o CLONE client", "o(id, name)"),
        ("CREATE TABLE o LIKE client", "o(id, name)"),
        ("CREATE DYNAMIC TABLE o TARGET_LAG = '1 minute' WAREHOUSE = w AS SELECT id FROM client", "o(id)"),
        ("CREATE HYBRID TABLE o (id int PRIMARY KEY)", "o(id)"),
        ("CREATE ICEBERG TABLE o (a INT) CATALOG = 'x'", "o(a)"),
        ("CREATE OR REPLACE SECURE VIEW o (a COMMENT 'x', b) COPY GRANTS AS SELECT 1, 2", "o(a, b)"),
        ('CREATE TABLE "My T" ("id" int, "ID2" int, lower int)', '"My T"("id", ID2, lower)'),
    ],
    "redshift": [
        (
            "CREATE TABLE s.o (id int ENCODE az64 DISTKEY, b varchar(20) ENCODE lzo SORTKEY, c super) DISTSTYLE KEY",
            "s.o(id, b, c)",
        ),
        ("CREATE EXTERNAL TABLE x.o (a int) PARTITIONED BY (d date) STORED AS PARQUET LOCATION 's3://x'", "x.o(a, d)"),
        ("CREATE VIEW o AS SELECT id FROM client WITH NO SCHEMA BINDING", "o(id)"),
    ],
    "hive": [
        ("CREATE EXTERNAL TABLE IF NOT EXISTS d.o (a INT) PARTITIONED BY (ds STRING) STORED AS TEXTFILE", "d.o(a, ds)"),
        ("CREATE TABLE o (s STRUCT<x: INT, y: ARRAY<STRUCT<z: STRING>>>)", "o(s.x, s.y[].z)"),
    ],
    "oracle": [
        (
            'CREATE TABLE "O" ("A" NUMBER(9,0) NOT NULL ENABLE, "V" NUMBER GENERATED ALWAYS AS ("A" * 2) VIRTUAL, '
            'CONSTRAINT "K" PRIMARY KEY ("A") USING INDEX PCTFREE 10 INITRANS 2 STORAGE(INITIAL 9 NEXT 1) TABLESPACE "U" ENABLE, '
            'CONSTRAINT "F" FOREIGN KEY ("A") REFERENCES "CLIENT" ("ID") ENABLE) SEGMENT CREATION IMMEDIATE',
            "O(A -> client.id, V)",
        ),
        (
            'CREATE TABLE "HR"."EMP" ("ID" NUMBER(10,0) NOT NULL ENABLE, "low" VARCHAR2(20 CHAR), CONSTRAINT "PK" PRIMARY KEY '
            '("ID") USING INDEX TABLESPACE "USERS" ENABLE, SUPPLEMENTAL LOG DATA (ALL) COLUMNS) SEGMENT CREATION IMMEDIATE',
            'HR.EMP(ID, "low")',
        ),
        ("REM the table's\nPROMPT Creating it's table\nCREATE TABLE o (a NUMBER)", "o(a)"),
        ("CREATE TABLE o (a NUMBER)\n/\nCREATE TABLE p (b NUMBER)\n/\n", "o(a)|p(b)"),
        ("CREATE OR REPLACE FORCE EDITIONABLE VIEW o (a, b) AS SELECT 1, 2 FROM dual WITH READ ONLY", "o(a, b)"),
        ("CREATE GLOBAL TEMPORARY TABLE o (a NUMBER) ON COMMIT PRESERVE ROWS", "o(a)"),
    ],
    "clickhouse": [
        (
            "CREATE TABLE d.o (a UInt8 CODEC(ZSTD), n Nested(x UInt8), INDEX i a TYPE minmax GRANULARITY 1, "
            "PROJECTION p (SELECT a ORDER BY a)) ENGINE = MergeTree ORDER BY a",
            "d.o(a, n.x)",
        ),
    ],
    "sqlite": [
        ("CREATE OR REPLACE TABLE o (a int)", "o(a)"),
        ("PRAGMA foreign_keys = ON\nCREATE TABLE o (a)", "o(a)"),
        ("CREATE TEMPORARY TABLE o (a, b)", "o(a, b)"),
        ("CREATE TABLE o AS SELECT id, name AS n FROM client", "o(id, n)"),
        (
            "CREATE TABLE sales.o (a int, c int REFERENCES o2(a)); CREATE TABLE o2 (a int)",
            "sales.o(a, c -> o2.a)|o2(a)",
        ),
        ("CREATE VIEW o (i) AS SELECT id FROM client", "o(i)"),
        ("CREATE VIEW o AS SELECT * FROM later; CREATE TABLE later (z)", "o(z)|later(z)"),
        ("CREATE VIRTUAL TABLE o USING fts5(a, b UNINDEXED, tokenize = 'porter')", "o(a, b)"),
        ("CREATE VIRTUAL TABLE o USING fts4(a, b TEXT, tokenize=unicode61)", "o(a, b)"),
        ("CREATE VIRTUAL TABLE o USING rtree(id, x0, x1)", "o(id, x0, x1)"),
        ("CREATE VIRTUAL TABLE o USING vec0(e float[3], id integer)", "o(e, id)"),
        (
            "CREATE VIRTUAL TABLE o USING fts5(a); CREATE TABLE o_archive (b); CREATE TABLE o_d (c)",
            "o(a)|o_archive(b)|o_d(c)",
        ),
        ("CREATE TABLE o (a int)\n\nCREATE TABLE p (b int)", "o(a)|p(b)"),
    ],
}


@pytest.mark.parametrize(
    ("dialect", "ddl", "shown"), [(name, *case) for name, cases in SHOWN.items() for case in cases]
)
def test_every_table_and_view_is_shown_with_its_columns(dialect: str, ddl: str, shown: str) -> None:
    assert compact(parse_ddl(FIRST + ddl, dialect)).splitlines() == ["client(id, name)", *shown.split("|")]


CHANGED = [
    (
        "postgres",
        "ALTER TABLE ONLY public.client ADD CONSTRAINT f FOREIGN KEY (id) REFERENCES u(id)",
        "client(id -> u.id, name)",
    ),
    ("postgres", "ALTER TABLE client ADD COLUMN x int, DROP COLUMN name", "client(id, x)"),
    ("postgres", 'ALTER TABLE client RENAME COLUMN name TO "Name"', 'client(id, "Name")'),
    ("postgres", "ALTER TABLE client RENAME TO customer", "customer(id, name)"),
    (
        "mysql",
        "ALTER TABLE `client` ADD PRIMARY KEY (`id`), ADD CONSTRAINT `f` FOREIGN KEY (`id`) REFERENCES `u` (`id`)",
        None,
    ),
    ("mysql", "ALTER TABLE client CHANGE name full_name varchar(20)", "client(id, full_name)"),
    (
        "tsql",
        "ALTER TABLE [client] WITH CHECK ADD CONSTRAINT [F] FOREIGN KEY([id]) REFERENCES [u] ([id])\nGO\n"
        "ALTER TABLE [client] CHECK CONSTRAINT [F]",
        "client(id -> u.id, name)",
    ),
    ("sqlite", "ALTER TABLE client ADD COLUMN x REFERENCES client (id)", "client(id, name, x -> client.id)"),
    ("sqlite", "ALTER TABLE client RENAME COLUMN name TO n; CREATE TABLE t (a); DROP TABLE t", "client(id, n)"),
    ("mysql", "DROP TABLE IF EXISTS `client`; CREATE TABLE `client` (a int)", "client(a)"),
    ("snowflake", "CREATE OR REPLACE TABLE client (a int)", "client(a)"),
    ("postgres", "CREATE TABLE IF NOT EXISTS client (a int)", "client(id, name)"),
]


@pytest.mark.parametrize(("dialect", "ddl", "shown"), CHANGED)
def test_later_statements_change_what_earlier_ones_made(dialect: str, ddl: str, shown: str | None) -> None:
    assert compact(parse_ddl(FIRST + ddl, dialect)) == (shown or "client(id -> u.id, name)")


IRRELEVANT = {
    "postgres": [
        "COMMENT ON TABLE client IS 'a; CREATE TABLE x (y int)'",
        "SELECT pg_catalog.set_config('search_path', '', false)",
        "CREATE FUNCTION f() RETURNS TABLE (a int) LANGUAGE sql AS $_$ SELECT 1; CREATE TABLE x (y int); $_$",
        "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
        "CREATE TRIGGER t BEFORE INSERT ON client FOR EACH ROW EXECUTE FUNCTION f()",
        "CREATE EVENT TRIGGER e ON ddl_command_end EXECUTE FUNCTION f()",
        "CREATE TYPE mood AS ENUM ('a', 'b')",
        "CREATE FOREIGN DATA WRAPPER f",
        "CREATE UNIQUE INDEX i ON client USING btree (id)",
        "COPY client (id, name) FROM stdin;\n1\tit's\n2\t\"x;\n\\.\n",
        "\\restrict abc\nSET x = 1",
        "ALTER TABLE client OWNER TO bob",
        "ALTER TABLE ONLY client ATTACH PARTITION c20 FOR VALUES FROM (1) TO (2)",
        "ALTER TABLE public.client ALTER COLUMN id ADD GENERATED ALWAYS AS IDENTITY (SEQUENCE NAME s START WITH 1)",
        "ALTER TABLE client ENABLE ROW LEVEL SECURITY",
        "ALTER TABLE client ADD CONSTRAINT u UNIQUE (id)",
        "ALTER TABLE elsewhere ADD COLUMN x int",
        "ALTER SEQUENCE s OWNED BY client.id",
        "GRANT SELECT ON client TO x",
        "INSERT INTO client VALUES (1, 'CREATE TABLE x (y int)')",
        "CREATE FUNCTION f() RETURNS void LANGUAGE sql AS 'CREATE TABLE x (y int)'",
        "DROP INDEX i",
    ],
    "mysql": [
        "/*!40101 SET NAMES utf8 */",
        "LOCK TABLES `client` WRITE; INSERT INTO client VALUES (1, 'CREATE TABLE x (y int)'); UNLOCK TABLES",
        "DELIMITER ;;\nCREATE TRIGGER t BEFORE INSERT ON client FOR EACH ROW BEGIN SET @x = 1; END ;;\nDELIMITER ;\n",
        "CREATE DATABASE `x` /*!40100 DEFAULT CHARACTER SET utf8 */",
        "ALTER TABLE `client` DISABLE KEYS",
        "SELECT id INTO @x FROM client",
    ],
    "tsql": [
        "GRANT CREATE TABLE TO x",
        "USE [db]\nGO\nSET QUOTED_IDENTIFIER ON\nGO",
        "CREATE PROCEDURE p AS BEGIN\nCREATE TABLE #t (a int);\nSELECT 1;\nEND",
        "EXEC sys.sp_addextendedproperty @name = N'x', @value = N'y'",
        "ALTER TABLE client ADD CONSTRAINT [D] DEFAULT ((0)) FOR [id]",
        "CREATE TYPE dbo.tt AS TABLE (a int)",
    ],
    "oracle": ["CREATE OR REPLACE PROCEDURE p IS BEGIN IF 1 = 1 THEN NULL; END IF; END;\n/\n"],
    "snowflake": ["CREATE STREAM s ON TABLE client", "CREATE FILE FORMAT f TYPE = CSV"],
    "bigquery": ["CREATE TABLE FUNCTION ds.f(x INT64) AS SELECT 1"],
    "sqlite": [
        "PRAGMA foreign_keys = OFF",
        "BEGIN; COMMIT",
        "CREATE TRIGGER t AFTER INSERT ON client BEGIN SELECT 1; END",
    ],
}


@pytest.mark.parametrize(("dialect", "ddl"), [(name, ddl) for name, cases in IRRELEVANT.items() for ddl in cases])
def test_statements_that_make_no_table_are_passed_over(dialect: str, ddl: str) -> None:
    after = "\nGO\n" if dialect == "tsql" else ";\n"
    tables = parse_ddl(f"{FIRST}{ddl}{after}CREATE TABLE z (a int)", dialect)
    assert compact(tables) == "client(id, name)\nz(a)"


ERRORS = [
    ("postgres", "CREATE TABLE o OF some_type", "CREATE TABLE o OF"),
    ("postgres", "CREATE TABLE o AS EXECUTE x", "columns cannot be read, in: CREATE TABLE o AS"),
    ("postgres", "CREATE VIEW o AS SELECT * FROM nowhere", "columns cannot be known: .*, in: CREATE VIEW o"),
    ("postgres", "CREATE TABLE o (LIKE nowhere)", "columns from nowhere, .*, in: CREATE TABLE o"),
    ("postgres", "DO $$ BEGIN CREATE TABLE o (a int); END $$", "inside a block or a text.*, in: DO "),
    ("postgres", "ALTER TABLE client SET SCHEMA z", "in: ALTER TABLE client SET SCHEMA z"),
    ("postgres", "CREATE TABLE o (a int, b int MADE UP)", "in: CREATE TABLE o"),
    ("postgres", "CREATE TABLE o (a text DEFAULT 'x)", "a quote or comment in it is not closed"),
    ("postgres", "CALL p() CREATE TABLE o (a int, b MADE UP TYPE)", "inside a block or a text"),
    ("tsql", "EXEC sp_executesql N'CREATE VIEW o AS SELECT 1 AS a'", "inside a block or a text"),
    ("tsql", "CREATE TABLE o (a int MADE UP)", "in: CREATE TABLE o"),
    ("mysql", "RENAME TABLE client TO other", "not a statement that is known, in: RENAME"),
    (
        "spark",
        "CREATE TEMPORARY VIEW o USING csv OPTIONS (path 'x')",
        "columns cannot be read, in: CREATE TEMPORARY VIEW",
    ),
    ("sqlite", "CREATE VIEW o AS SELECT * FROM nowhere", "in: CREATE VIEW o"),
    ("sqlite", "FOO BAR", "not a statement that is known, in: FOO BAR"),
    ("sqlite", "CREATE SOMETHING NEW o (a int)", "in: CREATE SOMETHING"),
]


@pytest.mark.parametrize(("dialect", "ddl", "message"), ERRORS)
def test_what_cannot_be_read_is_an_error_that_quotes_the_statement(dialect: str, ddl: str, message: str) -> None:
    with raises("sql.bad_schema", match=message):
        parse_ddl(FIRST + ddl, dialect)


@pytest.mark.parametrize("dialect", ["postgres", "mysql", "tsql", "snowflake", "bigquery"])
def test_tables_of_two_schemas_stay_apart(dialect: str) -> None:
    ddl = """CREATE TABLE sales.client (id INT); CREATE TABLE staging.client (id INT);
             CREATE TABLE sales.orders (c INT REFERENCES sales.client(id));
             CREATE TABLE staging.orders (c INT, FOREIGN KEY (c) REFERENCES client(id))"""
    assert compact(parse_ddl(ddl, dialect)).splitlines() == [
        "sales.client(id)",
        "staging.client(id)",
        "sales.orders(c -> sales.client.id)",
        "staging.orders(c -> staging.client.id)",
    ]


def test_a_dump_with_its_keys_at_the_end() -> None:
    dump = r"""
\restrict x1
SET statement_timeout = 0;
CREATE TABLE public.client (id integer NOT NULL, name character varying(40) DEFAULT 'it''s; x'::character varying);
ALTER TABLE public.client OWNER TO postgres;
CREATE SEQUENCE public.client_id_seq AS integer START WITH 1;
CREATE TABLE public.orders (id integer NOT NULL, client_id integer);
CREATE VIEW public.big AS
 SELECT orders.id, client.name FROM (public.orders JOIN public.client ON ((orders.client_id = client.id)));
COPY public.client (id, name) FROM stdin;
1	O'Brien; "x
\.
ALTER TABLE ONLY public.client ADD CONSTRAINT client_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.orders
    ADD CONSTRAINT orders_fk FOREIGN KEY (client_id) REFERENCES public.client(id) ON DELETE CASCADE NOT VALID;
\unrestrict x1
"""
    tables = parse_ddl(dump, "postgres")
    assert compact(tables).splitlines() == [
        "public.client(id, name)",
        "public.orders(id, client_id -> public.client.id)",
        "public.big(id, name)",
    ]
    assert tables[0].primary_key == ("id",)
