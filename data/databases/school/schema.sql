CREATE TABLE teacher (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    subject TEXT NOT NULL,
    salary INTEGER,
    hired_on TEXT NOT NULL
);
CREATE TABLE student (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    grade INTEGER NOT NULL,
    town TEXT,
    birth_date TEXT NOT NULL
);
CREATE TABLE course (
    id INTEGER PRIMARY KEY,
    title TEXT NOT NULL,
    teacher_id INTEGER NOT NULL REFERENCES teacher(id),
    room INTEGER,
    credits INTEGER NOT NULL
);
CREATE TABLE enrolment (
    id INTEGER PRIMARY KEY,
    student_id INTEGER NOT NULL REFERENCES student(id),
    course_id INTEGER NOT NULL REFERENCES course(id),
    term TEXT NOT NULL,
    mark INTEGER
);
