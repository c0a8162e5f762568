CREATE TABLE film (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    director TEXT NOT NULL,
    year INTEGER NOT NULL,
    minutes INTEGER,
    language TEXT NOT NULL
);
CREATE TABLE member (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    city TEXT NOT NULL,
    age INTEGER,
    joined_on TEXT NOT NULL
);
CREATE TABLE screening (
    id INTEGER PRIMARY KEY,
    film_id INTEGER NOT NULL REFERENCES film(id),
    hall TEXT NOT NULL,
    shown_on TEXT NOT NULL,
    tickets INTEGER NOT NULL
);
CREATE TABLE review (
    id INTEGER PRIMARY KEY,
    film_id INTEGER NOT NULL REFERENCES film(id),
    member_id INTEGER NOT NULL REFERENCES member(id),
    stars INTEGER NOT NULL,
    comment TEXT
);
