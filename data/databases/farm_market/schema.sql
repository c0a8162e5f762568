CREATE TABLE farmer (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    village TEXT NOT NULL,
    hectares REAL,
    joined_on TEXT NOT NULL
);
CREATE TABLE product (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    farmer_id INTEGER NOT NULL REFERENCES farmer(id),
    category TEXT NOT NULL,
    price REAL
);
CREATE TABLE purchase (
    id INTEGER PRIMARY KEY,
    product_id INTEGER NOT NULL REFERENCES product(id),
    buyer TEXT NOT NULL,
    bought_on TEXT NOT NULL,
    kilos REAL NOT NULL
);
CREATE TABLE inspection (
    id INTEGER PRIMARY KEY,
    farmer_id INTEGER NOT NULL REFERENCES farmer(id),
    inspector TEXT NOT NULL,
    inspected_on TEXT NOT NULL,
    score INTEGER
);
