CREATE TABLE ship (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    flag TEXT NOT NULL,
    built INTEGER NOT NULL,
    capacity INTEGER NOT NULL
);
CREATE TABLE port (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    country TEXT NOT NULL,
    depth INTEGER
);
CREATE TABLE voyage (
    id INTEGER PRIMARY KEY,
    ship_id INTEGER NOT NULL REFERENCES ship(id),
    port_id INTEGER NOT NULL REFERENCES port(id),
    left_on TEXT NOT NULL,
    arrived_on TEXT
);
CREATE TABLE container (
    id INTEGER PRIMARY KEY,
    voyage_id INTEGER NOT NULL REFERENCES voyage(id),
    goods TEXT NOT NULL,
    owner TEXT NOT NULL,
    weight REAL
);
