CREATE TABLE author (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    country TEXT NOT NULL,
    birth_year INTEGER
);
CREATE TABLE book (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    author_id INTEGER NOT NULL REFERENCES author(id),
    genre TEXT NOT NULL,
    year INTEGER NOT NULL,
    pages INTEGER
);
CREATE TABLE reader (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    district TEXT NOT NULL,
    email TEXT,
    joined_on TEXT NOT NULL
);
CREATE TABLE loan (
    id INTEGER PRIMARY KEY,
    book_id INTEGER NOT NULL REFERENCES book(id),
    reader_id INTEGER NOT NULL REFERENCES reader(id),
    loaned_on TEXT NOT NULL,
    returned_on TEXT
);
