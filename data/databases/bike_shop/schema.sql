CREATE TABLE bike (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    brand TEXT NOT NULL,
    kind TEXT NOT NULL,
    price INTEGER NOT NULL,
    stock INTEGER NOT NULL
);
CREATE TABLE customer (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    city TEXT NOT NULL,
    phone TEXT,
    joined_on TEXT NOT NULL
);
CREATE TABLE sale (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customer(id),
    bike_id INTEGER NOT NULL REFERENCES bike(id),
    sold_on TEXT NOT NULL,
    quantity INTEGER NOT NULL
);
CREATE TABLE repair (
    id INTEGER PRIMARY KEY,
    customer_id INTEGER NOT NULL REFERENCES customer(id),
    task TEXT NOT NULL,
    cost INTEGER,
    received_on TEXT NOT NULL,
    finished_on TEXT
);
