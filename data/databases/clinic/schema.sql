CREATE TABLE doctor (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    specialty TEXT NOT NULL,
    room INTEGER,
    hired_on TEXT NOT NULL
);
CREATE TABLE patient (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    birth_date TEXT NOT NULL,
    town TEXT NOT NULL,
    insurer TEXT
);
CREATE TABLE visit (
    id INTEGER PRIMARY KEY,
    patient_id INTEGER NOT NULL REFERENCES patient(id),
    doctor_id INTEGER NOT NULL REFERENCES doctor(id),
    visit_date TEXT NOT NULL,
    reason TEXT NOT NULL,
    fee INTEGER
);
CREATE TABLE prescription (
    id INTEGER PRIMARY KEY,
    visit_id INTEGER NOT NULL REFERENCES visit(id),
    drug TEXT NOT NULL,
    days INTEGER NOT NULL
);
