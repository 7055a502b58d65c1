-- Every row says which pipeline it belongs to. A file holds the copy of one source so far, whose pipeline has the id 1.
ALTER TABLE _rhei.pipeline ADD COLUMN pipeline_id UINTEGER DEFAULT 1;
ALTER TABLE _rhei.pipeline ALTER COLUMN pipeline_id SET NOT NULL;

ALTER TABLE _rhei.tables ADD COLUMN pipeline_id UINTEGER DEFAULT 1;
ALTER TABLE _rhei.tables ALTER COLUMN pipeline_id SET NOT NULL;

ALTER TABLE _rhei.columns ADD COLUMN pipeline_id UINTEGER DEFAULT 1;
ALTER TABLE _rhei.columns ALTER COLUMN pipeline_id SET NOT NULL;

ALTER TABLE _rhei.cycles ADD COLUMN pipeline_id UINTEGER DEFAULT 1;
ALTER TABLE _rhei.cycles ALTER COLUMN pipeline_id SET NOT NULL;

ALTER TABLE _rhei.jobs ADD COLUMN pipeline_id UINTEGER DEFAULT 1;
ALTER TABLE _rhei.jobs ALTER COLUMN pipeline_id SET NOT NULL;
